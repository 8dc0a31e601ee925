"""`python -m keras_mixprec`: the command `keras-mixprec`."""

import sys

from keras_mixprec_cli.app import main

if __name__ == "__main__":
    sys.exit(main())

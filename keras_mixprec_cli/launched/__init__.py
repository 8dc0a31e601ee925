"""What a launched script's Python runs before the script: see `sitecustomize`."""

VARIABLE = "KERAS_MIXPREC_LAUNCH"

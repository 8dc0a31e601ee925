#!/usr/bin/env bash
# The GPU figures of docs/benchmarks.md, by group, so that each fits a short lease:
#
#     OUT=results TOTAL=570 benchmarks/gpu.sh tf-xla jax
#     benchmarks/gpu.sh tf-xla -- --steps 5 --blocks 3
#
#     JOBS=9 TOGETHER=1 TIMEOUT=400 TOTAL=570 benchmarks/gpu.sh scaling
#     JOBS=2 TOGETHER=1 TIMEOUT=400 TOTAL=570 benchmarks/gpu.sh scaling-resnet
#
# Groups: tf-xla tf-noxla jax torch precision resnet dlrm mlp peers optimizer;
# inspector, activations, and scaling and scaling-resnet, which need two GPUs, have to
# be asked for.
# Without a group: all, the most important first. Results come as JSON lines, printed
# and appended to OUT (default benchmarks/results). TIMEOUT: seconds per row; TOTAL:
# seconds in all; JOBS: rows at a time; TOGETHER: not empty, they compile side by side
# and are timed one after the other (run_matrix.py --together); BACKENDS: of which alone;
# PYTHON: the interpreter; RUN: the day on which a run began that goes past midnight, so
# that its rows are compared.
set -u
here="$(cd "$(dirname "$0")" && pwd)"
groups=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    groups+=("$1")
    shift
done
if [ ${#groups[@]} -eq 0 ]; then
    groups=(tf-xla jax tf-noxla torch precision resnet dlrm peers mlp optimizer)
fi
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
# An outer limit too: a process that hangs in a driver must not outlive the lease.
exec timeout -k 10 "$((${TOTAL:-36000} + 20))" \
    "${PYTHON:-python3}" "$here/run_matrix.py" --rows "${groups[@]}" \
    --out "${OUT:-$here/results}" --timeout "${TIMEOUT:-300}" \
    --total "${TOTAL:-36000}" --jobs "${JOBS:-1}" ${TOGETHER:+--together} \
    ${BACKENDS:+--backends $BACKENDS} "$@"

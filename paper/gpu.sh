#!/usr/bin/env bash
# What only a GPU can tell, in two calls of under ten minutes each, on one GPU of 80 GB. (Commit
# 6a83bd3 has `first` and `second`, which were made in November 2026: see PERFORMANCE.md.)
#
#     bash paper/gpu.sh third         # kinds of attention; iterations with the fastest, and with
#                                     # rollouts in one CUDA graph
#     bash paper/gpu.sh fourth        # whole models with text encoders and scorers: FLUX.1-dev,
#                                     # klein, Stable Diffusion 3.5 medium, Z-Image; compiled tests
#     bash paper/gpu.sh collect       # what lies in OUT, into paper/results/gpu.json
#     DEVICE=cpu bash paper/gpu.sh third      # a rehearsal without a GPU: a narrow model, more time
#
# Nothing is downloaded: weights are random or those of tiny/. The most telling comes first, each
# step has a time limit, and all of a call together has one, LIMIT seconds (default 540). What a
# step prints goes to a file in OUT (default out/gpu) as it comes; OUT/summary.txt has a line a step,
# OUT/results.jsonl a line for each result.
#
# Packages that are missing are installed from a folder wheels/, which git ignores. Fill it where
# there is a network, for Python 3.12 on Linux, beside a torch and transformers that are there:
#
#     pip download --no-deps --python-version 3.12 --only-binary=:all: -d wheels \
#         --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
#         diffusers==0.42.1 open_clip_torch==3.3.0 ftfy wcwidth importlib_metadata zipp \
#         requests urllib3 charset_normalizer idna certifi
#
# `third` also tries FlashAttention's CuTe kernels if they are there, 80 MB more (a later flash-attn-4
# does not fit torch 2.11): flash-attn-4==4.0.0b10 quack-kernels==0.3.3 nvidia-cutlass-dsl==4.4.2
# nvidia-cutlass-dsl-libs-base==4.4.2 apache-tvm-ffi==0.1.9 torch-c-dlpack-ext==0.1.5
set -u
cd "$(dirname "$0")/.."
CALL=${1:-third} DEVICE=${DEVICE:-cuda} OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
LIMIT=${LIMIT:-540}             # seconds, of all steps together
PATIENCE=1                      # every step's limit is multiplied by it
export PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 TEST_DEVICE=$DEVICE
mkdir -p "$OUT"
TEMP=$(mktemp -d)
trap 'rm -rf "$TEMP"' EXIT
if [ "$DEVICE" = cpu ]; then
    SIZE="--geometry flux-narrow" MORE="--device cpu --lora_rank 4 --checkpoint_blocks -1"
    PATIENCE=5 LIMIT=$((5 * LIMIT)) WHOLE="$MORE --shift 0"
else
    SIZE="--geometry flux" MORE=""
    WHOLE="--lora_rank 64 --checkpoint_blocks -1 --shift 0 --rewards hpsv2,pickscore,imagereward"
fi

step() {    # step NAME SECONDS COMMAND...: run it, at most so long, and note how it ended
    local name=$1 seconds=$((PATIENCE * $2)) began=$SECONDS left=$((LIMIT - SECONDS)) status=0
    shift 2
    if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
    if [ "$seconds" -lt 10 ]; then
        status="left out, no time" seconds=0
    else
        timeout -k 5 "$seconds" "$@" < /dev/null > "$OUT/$name.txt" 2>&1 || status=$?
        if [ "$status" = 124 ] || [ "$status" = 137 ]; then status="stopped by its limit"; fi
        tail -n 14 "$OUT/$name.txt" | cut -c 1-240
    fi
    echo "=== $name: $((SECONDS - began)) s of at most $seconds, exit status $status" |
        tee -a "$OUT/summary.txt"
}

missing() { ! "$PYTHON" -c "import machine, importlib; importlib.import_module('$1')" 2>/dev/null; }

if ls wheels/*.whl >/dev/null 2>&1 && { missing diffusers || missing open_clip; }; then
    step wheels 60 "$PYTHON" -m pip install --no-index --no-deps wheels/*.whl
fi

collect='
import json, pathlib, sys
out, path = pathlib.Path(sys.argv[1]), pathlib.Path("paper/results/gpu.json")
output = {file.name: file.read_text(encoding="utf-8") for file in sorted(out.iterdir()) if file.suffix == ".txt"}
lines = [json.loads(line) for line in open(out / "results.jsonl")]
runs = json.loads(path.read_text(encoding="utf-8"))
path.write_text(json.dumps([*runs, dict(lines=lines, output=output)], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
'

case $CALL in
third)
    step attention 150 "$PYTHON" -m paper.gpu attention "${SIZE#* }" "$OUT/results.jsonl" $MORE
    kind=$(sed -n "s/^fastest: //p" "$OUT/attention.txt")
    step fast 210 "$PYTHON" -m paper.bench ladder $SIZE --repeats 1 --steps 4,5 --profile \
        --attention "${kind:-flash}" $MORE
    if [ "${kind:-flash}" != flash ]; then      # to compare with
        step flash 150 "$PYTHON" -m paper.bench ladder $SIZE --repeats 1 --steps 4 $MORE
    fi
    ;;
fourth)
    step flux 170 "$PYTHON" -m paper.gpu flux offload,offload, "$OUT/results.jsonl" $WHOLE \
        --resolution 720 --prompts_per_iteration 1 --compile --out_dir "$TEMP/flux"
    step klein 150 "$PYTHON" -m paper.gpu klein offload "$OUT/results.jsonl" $WHOLE --guidance 4 \
        --resolution 720 --prompts_per_iteration 4 --batch 2 --no-compile --out_dir "$TEMP/klein"
    for name in sd3 z_image; do
        step $name 60 "$PYTHON" -m paper.gpu $name offload "$OUT/results.jsonl" $WHOLE \
            --resolution 512 --prompts_per_iteration 1 --no-compile --out_dir "$TEMP/$name"
    done
    step tests_compiled 100 "$PYTHON" -m pytest -v -s -k "compiled and (4 or bf16)" \
        tests/test_gpu.py
    ;;
collect)
    "$PYTHON" -c "$collect" "$OUT"
    exit
    ;;
*)
    echo "usage: bash paper/gpu.sh third|fourth|collect" >&2
    exit 2
    ;;
esac
cat "$OUT/summary.txt"

#!/usr/bin/env bash
# What no CPU can tell, on a machine with a GPU, in at most 8 minutes (10 with all limits). From the root of the repository:
#
#     bash benchmarks/gpu_check.sh                   every step; a line for each, and all that it prints in out-gpu-check
#     bash benchmarks/gpu_check.sh machine parts     these steps only
#     QUICK=1 bash benchmarks/gpu_check.sh           tries the script itself, on a CPU, with a small model
#
# It needs torch, numpy, tqdm and tiktoken, and no network. PY is the Python to take, OUT the folder for the results. The
# exit code is 1 if a step has failed. With several GPUs all strategies are trained and resumed, too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PY=${PY:-python3} OUT=${OUT:-out-gpu-check}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
wanted=" $* " failed=0 small=()
if [ "${QUICK:-}" ]; then
    small=(--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --vocab_size=512 --device=cpu --max_iters=6)
    export OMP_NUM_THREADS=1
fi
export https_proxy=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9  # a download fails at once, and does not hang
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$OUT/inductor TRITON_CACHE_DIR=$OUT/triton

is_wanted() { [ "$wanted" = '  ' ] || [[ $wanted == *" $1 "* ]]; }

report() {  # name, exit code, the one that is right, seconds: a line with what the step has said last
    local verdict=ok
    [ "$2" = "$3" ] || { verdict="FAIL, exit code $2"; failed=1; }
    printf '%-9s %3d s  %s  %s\n' "$1" "$4" "$verdict" "$(grep -v '^ *$' "$OUT/$1.log" | tail -1 | cut -c1-150)"
}

step() {  # seconds at most, name, command
    local limit=$1 name=$2 begun=$SECONDS; shift 2
    is_wanted "$name" || return 0
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    report "$name" $? 0 $((SECONDS - begun))
}

probe() { step "$1" "$2" "$PY" benchmarks/gpu_probe.py --part="$3" --dataset="$OUT/corpus" --out_dir="$OUT/$2" \
    ${QUICK:+--device=cpu}; }

settings=(--dataset="$OUT/corpus" --eval_iters=2 --sample_interval=0 --eval_interval=1000 --log_interval=5)
train() {  # seconds at most, name, settings: a short run from scratch
    local limit=$1 name=$2; shift 2
    step "$limit" "$name" "$PY" train.py "${settings[@]}" --out_dir="$OUT/$name" --overwrite=True --max_iters=30 \
        --lr_decay_iters=30 --warmup_iters=3 "$@" "${small[@]}"
    rm -f "$OUT/$name/"*.pt
}

tokens() {  # a corpus whose tokens are as unequal as those of a text
    timeout 20 "$PY" - "$OUT/corpus" ${QUICK:+512} <<'END'
import sys
from pathlib import Path

import numpy as np

folder, n_ids = Path(sys.argv[1]), int((*sys.argv, 50257)[2])
folder.mkdir(exist_ok=True)
chance = np.random.default_rng(1)
for split, count in (('train', 20_000_000), ('val', 400_000)):
    np.minimum(chance.zipf(1.2, count), n_ids - 1).astype('<u2').tofile(folder / f'{split}.bin')
END
}

stop() {  # seconds at most: a run that is asked to stop once it has learned something saves and says so
    local begun=$SECONDS run guard; is_wanted stop || return 0
    rm -rf "$OUT/stop"
    "$PY" train.py "${settings[@]}" --out_dir="$OUT/stop" --batch_size=12 --gradient_accumulation_steps=4 \
        "${small[@]}" --max_iters=1000000 >"$OUT/stop.log" 2>&1 &
    run=$!
    (sleep "$1"; kill -9 $run) 2>/dev/null &
    guard=$!
    until [ -s "$OUT/stop/metrics.jsonl" ] || ! kill -0 $run 2>/dev/null; do sleep 0.2; done
    kill -USR1 $run 2>/dev/null
    wait $run
    report stop $? 75 $((SECONDS - begun))
    kill $guard 2>/dev/null
}

resume() {  # seconds at most: five steps more than that run has made
    is_wanted resume || return 0
    local made; made=$(grep -so '"step": *[0-9]*' "$OUT/stop/status.json" | grep -o '[0-9]*$')
    step "$1" resume "$PY" train.py "${settings[@]}" --out_dir="$OUT/stop" --init_from=resume --batch_size=12 \
        --gradient_accumulation_steps=4 "${small[@]}" --max_iters=$((${made:-0} + 5))
    rm -f "$OUT/stop/"*.pt
}

same() {  # two runs of the same bits
    is_wanted same || return 0
    local wanted='  ' turn
    for turn in 1 2; do
        train 25 same$turn --batch_size=4 --gradient_accumulation_steps=2 --deterministic=True --dropout=0.1 \
            --max_iters=10 --log_interval=1
    done
    [ -s "$OUT/same1/metrics.jsonl" ] && cmp <(losses same1) <(losses same2) >"$OUT/same.log" && echo 'the losses of both runs are equal' >>"$OUT/same.log"
    report same $? 0 0
}
losses() { grep -o '"loss": [^,]*' "$OUT/$1/metrics.jsonl"; }

tokens || exit
probe 30 machine machine
probe 180 parts compiling && grep '^B=' "$OUT/parts.log" 2>/dev/null
train 45 b12 --batch_size=12 --gradient_accumulation_steps=40 --max_iters=11
train 40 b64 --batch_size=64 --gradient_accumulation_steps=8 --max_iters=11
probe 30 waits waits
step 30 check "$PY" train.py "${settings[@]}" --out_dir="$OUT/check" --check=True --compile=False "${small[@]}"
train 30 float16 --batch_size=12 --gradient_accumulation_steps=4 --dtype=float16
train 35 fsdp --batch_size=12 --gradient_accumulation_steps=4 --strategy=fsdp --activation_checkpointing=True
train 30 offload --batch_size=12 --gradient_accumulation_steps=2 --strategy=fsdp --cpu_offload=True --max_iters=5 \
    --compile=False
same
stop 30
resume 25
probe 25 writing writing

several=(-m torch.distributed.run --standalone --nproc_per_node=gpu train.py "${settings[@]}" --batch_size=12
         --gradient_accumulation_steps=40)
if "$PY" -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then
    for strategy in ddp zero1 fsdp; do
        step 60 $strategy "$PY" "${several[@]}" --out_dir="$OUT/$strategy" --overwrite=True --max_iters=20 \
            --strategy=$strategy
        step 60 $strategy-2 "$PY" "${several[@]}" --out_dir="$OUT/$strategy" --init_from=resume --max_iters=25 \
            --strategy=$strategy
        rm -f "$OUT/$strategy/"*.pt
    done
fi
exit $failed

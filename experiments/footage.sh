#!/usr/bin/env bash
# Pre-trains on the real clips of experiments/footage.py without and with the contrastive branch, and fine-tunes on five
# folds. From the project's root, for one GPU (an H100: five minutes):
#
#     bash experiments/footage.sh results.jsonl [seed ...]     run again, it goes on where it stopped
#     python -m experiments.table results.jsonl                mean ± standard deviation over folds and seeds
#
# Recipe small, but 8 frames; fine-tuning samples over the whole clip, without flips, as left and right are classes.
set -euo pipefail
export RESULTS=${1:?give the file of results} DATA=${DATA:-data/ego} OMP_NUM_THREADS=1
shift
export COMMON="--recipe small --frames 8 --micro-batch 0"
export PRETRAIN=${PRETRAIN:-"--epochs 50 --warmup-epochs 5 --repeats 4 --batch-size 64 --lr 1.2e-3"}
export TUNE=${TUNE:-"--epochs 25 --warmup-epochs 3 --batch-size 16 --lr 8e-3"}
export VIEWS="--sampling uniform --no-flip --no-rand-augment --erasing 0 --mixup 0 --cutmix 0 --smallest-crop 0.5
    --segments 1 --crops 1 --val-every 0"
PROCESSES=${PROCESSES:-6}

pretrain() {  # row, seed, flags
    local row=$1 seed=$2
    shift 2
    python pretrain.py $COMMON $PRETRAIN --data $DATA/all.txt --seed $seed --picture-every 0 \
        --out runs/ego-$row-$seed "$@" > runs/ego-$row-$seed.txt 2>&1
}

fine_tune() {  # fold, row, seed
    set -euo pipefail
    local fold=$1 row=$2 seed=$3 init=none out=runs/ego-$2-$3-fold$1 value
    local line="{\"row\": \"footage-$row\", \"seed\": $seed, \"fold\": $fold, \"measure\": \"fine-tuned\", \"value\":"
    if grep -qsF "$line" "$RESULTS"; then return; fi
    if [[ $row != none ]]; then init=runs/ego-$row-$seed; fi
    python finetune.py $COMMON $TUNE $VIEWS --data $DATA/train$fold.txt --val $DATA/test$fold.txt --seed $seed \
        --workers 2 --init $init --out $out > $out.txt 2>&1
    value=$(tail -n 1 $out.txt | sed -n 's/.*top-1 \([0-9.]*\) %.*/\1/p' | grep .)
    echo "$line $value}" | tee -a "$RESULTS"
}

export -f fine_tune
mkdir -p runs
seeds=${*:-0}
for seed in $seeds; do
    pretrain mae $seed --contrast-weight 0 &
    pretrain cmaev $seed
    wait
done
for seed in $seeds; do for fold in 0 1 2 3 4; do for row in none mae cmaev; do echo $fold $row $seed; done; done; done |
    xargs -L 1 -P $PROCESSES bash -c 'fine_tune "$@"' _

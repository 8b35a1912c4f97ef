#!/usr/bin/env bash
# Pre-trains, probes and fine-tunes all rows of the tables "The demo over three seeds" and "Ablation" in RESULTS.md.
# From the project's root:
#
#     bash experiments/ablation.sh results.jsonl               all rows; run again, it goes on where it stopped
#     bash experiments/ablation.sh results.jsonl '^demo '      those rows of the list below that match
#     python -m experiments.table results.jsonl                means ± standard deviations over seeds
#
# Each measurement appends a line {"row": ..., "seed": ..., "measure": ..., "value": ...} once. A measure is a linear or
# knn probe or fine-tuning (few: 40 epochs) with so many labels, value: top-1 in per cent; or held-out, value: L_r.
# A CMAE-V row takes 8 minutes of one core of an AMD EPYC, a long one 20. On a GPU, change the next lines to, for
# example, --subset 4000 --batch-size 64, GEOMETRY="--size 112 --patch 16", more PROCESSES, and the rows to vit_small.
set -euo pipefail
export RESULTS=${1:?give the file of results} OMP_NUM_THREADS=1 GEOMETRY=""
export PRETRAIN="--subset 1000 --epochs 10 --warmup-epochs 1 --picture-every 0"
export FEW="--epochs 40 --warmup-epochs 4"
PROCESSES=2

rows() {  # data, name, seed, encoder, flags of pretrain.py
    for seed in 0 1 2; do cat <<ROWS
demo none $seed vit_tiny
demo mae $seed vit_tiny --contrast-weight 0
demo cmaev $seed vit_tiny
motion none $seed vit_tiny
motion long-mae $seed vit_tiny --epochs 30 --warmup-epochs 3 --contrast-weight 0
motion long-cmaev $seed vit_tiny --epochs 30 --warmup-epochs 3
motion long-noshift $seed vit_tiny --epochs 30 --warmup-epochs 3 --max-shift 0
motion mae $seed vit_tiny --contrast-weight 0
motion cmaev $seed vit_tiny
motion noshift $seed vit_tiny --max-shift 0
motion convmae $seed convvit_tiny --contrast-weight 0
motion convcmaev $seed convvit_tiny
looks none $seed vit_tiny
looks mae $seed vit_tiny --contrast-weight 0
looks cmaev $seed vit_tiny
ROWS
    done
    cat <<ROWS
motion s-p2 0 vit_tiny --max-shift 2
motion s-p8 0 vit_tiny --max-shift 8
motion s-p16 0 vit_tiny --max-shift 16
motion s-w.07 0 vit_tiny --contrast-weight 0.07
motion w.5 0 vit_tiny --contrast-weight 0.5
motion s-w1 0 vit_tiny --contrast-weight 1
motion s-tau.2 0 vit_tiny --temperature 0.2
motion s-ratio.75 0 vit_tiny --mask-ratio 0.75
motion s-ratio.95 0 vit_tiny --mask-ratio 0.95
motion s-nocolor 0 vit_tiny --no-color-augment
motion s-batch64 0 vit_tiny --batch-size 64
ROWS
}

make() {  # data of the rows, folder, arguments of make_demo
    if grep -q "^$1 " runs/rows.txt && [[ ! -e data/$2 ]]; then
        python -c "import cmaev; cmaev.make_demo('data/$2', $3)"
    fi
}

top1() {  # the accuracy in the last line of finetune.py; fails where there is none
    tail -n 1 | sed -n 's/.*top-1 \([0-9.]*\) %.*/\1/p' | grep .
}

row() {
    set -euo pipefail
    local data=$1 name=$1-$2 seed=$3 init=runs/$1-$2-$3 test=data/$1/val.txt trained="" pretrain measures measure
    local common="--recipe demo --data data/$1/train.txt --seed $3 --encoder $4 --workers 1 $GEOMETRY"
    case $name in
        demo-*) measures="linear_400 knn_400 fine-tuned_400" test=data/other/val.txt pretrain="" ;;
        *-s-*) measures="held-out linear_1000 linear_100 knn_1000" pretrain="$PRETRAIN --val $test" ;;
        *) measures="held-out linear_1000 linear_100 knn_1000 few_100" pretrain="$PRETRAIN --val $test" ;;
    esac
    if [[ $2 = none ]]; then init=none trained=none measures=${measures#held-out}; fi
    shift 4
    for measure in $measures; do
        local line="{\"row\": \"$name\", \"seed\": $seed, \"measure\": \"${measure/_/ }\", \"value\":" value
        if grep -qsF "$line" "$RESULTS"; then continue; fi
        if [[ ! $trained ]]; then
            python pretrain.py $common --out $init $pretrain "$@" >> $init.txt
            trained=yes
        fi
        local kind=${measure%_*} tune="python finetune.py $common --init $init --val $test"
        local out=runs/$kind-$name-$seed
        if [[ $data != demo ]]; then tune+=" --subset ${measure#*_}"; fi
        if [[ $kind = few ]]; then tune+=" $FEW"; fi
        case $kind in
            held-out)
                value=$(grep -o '"held_out_reconstruction": [0-9.]*' $init/log.jsonl | tail -n 1 | cut -d " " -f 2) ;;
            linear | knn)
                value=$($tune --probe $kind | top1) ;;
            few | fine-tuned)
                $tune --out $out >> $out.txt
                value=$(python finetune.py --eval --out $out --workers 1 | top1) ;;  # also of a run finished before
        esac
        echo "$line $value}" | tee -a "$RESULTS"
    done
}

export -f row top1
mkdir -p runs
rows | grep -E "${2:-.}" > runs/rows.txt
make demo demo "400, 200"
make demo other "10, 1000, seed=1"
make motion motion "4000, 1000, seed=1, looks=1"
make looks looks "4000, 1000, seed=1"
xargs -L 1 -P $PROCESSES bash -c 'row "$@"' _ < runs/rows.txt

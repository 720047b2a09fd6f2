#!/usr/bin/env bash
# Start from a model of the AIMNet2 ecosystem: train on DFT data from a format-2 artifact, and from nothing with the same
# budget, and compare the errors on molecules that were not trained on.
# Give an artifact (or a legacy .jpt, then MODEL must be set, too) as the first argument; without one, a closed-shell
# model is trained on the GFN2-xTB data of this folder and exported, as if it had come from elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python}
OUT=${OUT:-output/fine_tune}
EPOCHS=${EPOCHS:-60}
PRETRAINING=${PRETRAINING:-30}
CHANNELS=${CHANNELS:-1}
PRETRAINED=${1:-}
MODEL=${MODEL:-config/model_small.yaml}
mkdir -p "$OUT"

train() { # NAME FILES SAE EPOCHS LEARNING-RATE MODEL [OPTION]...
    "$PYTHON" -m aimnet2mult.train.cli --model "$6" --save "$OUT/$1.pt" --overwrite "${@:7}" \
        "data.fidelities.$1.files=$2" "data.fidelities.$1.sae=$3" data.val_split_by=composition run_name="$1" \
        checkpoint.dirname="$OUT/run_$1" data.samplers.train.kwargs.batch_size=64 \
        data.samplers.train.kwargs.batch_mode=molecules trainer.epochs="$4" optimizer.kwargs.lr="$5" \
        'scheduler={class: torch.optim.lr_scheduler.CosineAnnealingLR, unit: iteration, kwargs: {T_max: total, eta_min: 1.0e-5}, warmup: {iterations: 50, start: 0.01}}'
}

if [ -z "$PRETRAINED" ]; then
    echo "== a model from elsewhere: GFN2-xTB, one charge channel, format 2"
    PRETRAINED=$OUT/pretrained.pt
    sed "s/num_charge_channels: 2/num_charge_channels: $CHANNELS/" config/model_small.yaml > "$OUT/closed_shell.yaml"
    "$PYTHON" -m aimnet2mult.train.calc_sae data/fid1_gfn2_train.h5 "$OUT/sae_gfn2.yaml"
    train gfn2 data/fid1_gfn2_train.h5 "$OUT/sae_gfn2.yaml" "$PRETRAINING" 2e-3 "$OUT/closed_shell.yaml"
    "$PYTHON" -m aimnet2mult.tools.export "$OUT/gfn2.pt" "$PRETRAINED"
fi

echo "== DFT, from the pretrained model and from nothing"
"$PYTHON" -m aimnet2mult.train.calc_sae data/fid0_dft_train.h5 "$OUT/sae_dft.yaml"
train fine_tuned data/fid0_dft_train.h5 "$OUT/sae_dft.yaml" "$EPOCHS" 1e-3 "$MODEL" --load "$PRETRAINED"
train scratch data/fid0_dft_train.h5 "$OUT/sae_dft.yaml" "$EPOCHS" 2e-3 "$MODEL"

for name in fine_tuned scratch; do
    "$PYTHON" -m aimnet2mult.tools.evaluate --output "$OUT/report_$name" --model "$OUT/$name.pt" --data data/fid0_dft_test.h5
done

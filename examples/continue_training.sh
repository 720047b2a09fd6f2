#!/usr/bin/env bash
# Transfer learning: go on from the model of run_example.sh with the DFT data alone. The checkpoint has three
# fidelities, the new model one; the log says which rows and readouts were taken from it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python}
OUT=${OUT:-output}
if [ ! -f "$OUT/model.pt" ]; then
    echo "$OUT/model.pt does not exist yet: run ./run_example.sh first" >&2
    exit 2
fi

"$PYTHON" -m aimnet2mult.train.cli --model config/model_small.yaml --load "$OUT/model.pt" --save "$OUT/model_dft.pt" \
    --overwrite \
    data.fidelities.dft.files=data/fid0_dft_train.h5 data.fidelities.dft.sae="$OUT/sae_dft.yaml" \
    data.fidelities.dft.dispersion=none data.val_split_by=composition \
    checkpoint.dirname="$OUT/run_dft" run_name=dft trainer.epochs=10 optimizer.kwargs.lr=5e-4 scheduler=null \
    data.samplers.train.kwargs.batch_size=64 data.samplers.train.kwargs.batch_mode=molecules "$@"
"$PYTHON" -m aimnet2mult.tools.compile_jit --weights "$OUT/model_dft.pt" --output "$OUT/dft_only"
"$PYTHON" -m aimnet2mult.tools.evaluate --output "$OUT/report_dft" \
    --model "$OUT/dft_only_fid0.jpt" --data data/fid0_dft_test.h5

#!/usr/bin/env bash
# The whole main job on the data of this folder: reference energies -> training on three levels of theory at once ->
# one compiled model per level -> inference with PyTorch alone -> errors on molecules that were not trained on.
# Minutes on two CPU cores. Other settings: CONFIG=config/train.yaml MODEL=config/model.yaml ./run_example.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTHON=${PYTHON:-python}
CONFIG=${CONFIG:-config/train_small.yaml}
MODEL=${MODEL:-config/model_small.yaml}
OUT=${OUT:-output}
mkdir -p "$OUT/compiled"

NAMES=(dft gfn2 gfn1)
TRAIN=(data/fid0_dft_train.h5 data/fid1_gfn2_train.h5 data/fid2_gfn1_train.h5)
# B3LYP has no dispersion in its labels and gets D3(BJ); both xTB methods contain theirs already.
DISPERSION=("--dispersion d3bj --dispersion-functional b3lyp" "" "")

echo "== 0. a look at the data"
"$PYTHON" -m aimnet2mult.tools.check_data "dft=${TRAIN[0]}" "gfn2=${TRAIN[1]}" "gfn1=${TRAIN[2]}"

echo "== 1. reference energies"
# The data have ions and open shells: beside self-atomic energies, terms in charge and spin. The level with the most data
# comes first; the others are fitted to what differs from it.
TERMS=(--charge-term --spin-term)
"$PYTHON" -m aimnet2mult.train.calc_sae "${TRAIN[1]}" "$OUT/sae_gfn2.yaml" "${TERMS[@]}"
for f in 0 2; do
    "$PYTHON" -m aimnet2mult.train.calc_sae "${TRAIN[$f]}" "$OUT/sae_${NAMES[$f]}.yaml" "${TERMS[@]}" \
        --anchor "${TRAIN[1]}" --anchor-sae "$OUT/sae_gfn2.yaml"
done

echo "== 2. training"
"$PYTHON" -m aimnet2mult.train.cli --config "$CONFIG" --model "$MODEL" --save "$OUT/model.pt" --overwrite \
    data.fidelities.dft.sae="$OUT/sae_dft.yaml" \
    data.fidelities.gfn2.sae="$OUT/sae_gfn2.yaml" \
    data.fidelities.gfn1.sae="$OUT/sae_gfn1.yaml" \
    checkpoint.dirname="$OUT/run" "$@"

echo "== 3. one compiled model per level"
for f in 0 1 2; do
    # shellcheck disable=SC2086 # the options are several words
    "$PYTHON" -m aimnet2mult.tools.compile_jit --weights "$OUT/model.pt" --output "$OUT/compiled/model" \
        --fidelity-level "${NAMES[$f]}" ${DISPERSION[$f]}
done

echo "== 4. inference with PyTorch alone, and through ASE"
"$PYTHON" inference.py "$OUT/compiled"

echo "== 5. errors on the test files"
# Without the D3 that was added to the compiled DFT model: the labels have none.
"$PYTHON" -m aimnet2mult.tools.evaluate --output "$OUT/report" --history "$OUT/run/metrics.jsonl" --model "$OUT/model.pt" \
    --data dft=data/fid0_dft_test.h5 --data gfn2=data/fid1_gfn2_test.h5 --data gfn1=data/fid2_gfn1_test.h5

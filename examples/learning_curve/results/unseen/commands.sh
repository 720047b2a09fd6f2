#!/usr/bin/env bash
# The command lines of each point of the study, without trials of learning rates. They are run in the folder of the
# study, whose data they use, and write to another folder in it: RUNS=again bash commands.sh, or a part of them.
# OMP_NUM_THREADS says how many threads each has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-again}


# fine_tune, fraction 0.1, replicate 0
mkdir -p "$RUNS"/sae/gfn2_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae data/unseen_gfn2.h5 "$RUNS"/sae/gfn2_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/sae/gfn1_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae data/unseen_gfn1.h5 "$RUNS"/sae/gfn1_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/pretraining_ac4f2f/seed0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=data/unseen_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=data/unseen_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=30 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/fine_tune/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.1_r0/lr0.001_test/errors.json

# fine_tune, fraction 1, replicate 0
mkdir -p "$RUNS"/fine_tune/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/fine_tune/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f1_r0/lr0.001_test/errors.json

# joint_75, fraction 0.1, replicate 0
mkdir -p "$RUNS"/joint_75/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/joint_75/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=data/unseen_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=data/unseen_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.105, "gfn2": 0.437, "gfn1": 0.458}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.1_r0/lr0.002_test/errors.json

# joint_75, fraction 1, replicate 0
mkdir -p "$RUNS"/joint_75/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint_75/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=data/unseen_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=data/unseen_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.187, "gfn2": 0.396, "gfn1": 0.417}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f1_r0/lr0.002_test/errors.json

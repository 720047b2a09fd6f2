#!/usr/bin/env bash
# The command lines of each point of the study, without trials of learning rates. They are run in the folder of the
# study, whose data they use, and write to another folder in it: RUNS=again bash commands.sh, or a part of them.
# OMP_NUM_THREADS says how many threads each has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-again}


# target_only, fraction 0.02, replicate 0
mkdir -p "$RUNS"/target_only/f0.02_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s0.h5 "$RUNS"/target_only/f0.02_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.02_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.02_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.02_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.02_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.02_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.02_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.02_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.02_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.02_r0/lr0.001_test/errors.json

# target_only, fraction 0.05, replicate 0
mkdir -p "$RUNS"/target_only/f0.05_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s0.h5 "$RUNS"/target_only/f0.05_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.05_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.05_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.05_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.05_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.05_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.05_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.05_r0/lr0.001_test/errors.json

# target_only, fraction 0.1, replicate 0
mkdir -p "$RUNS"/target_only/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/target_only/f0.1_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.1_r0/lr0.001_test/errors.json

# target_only, fraction 0.25, replicate 0
mkdir -p "$RUNS"/target_only/f0.25_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.25_s0.h5 "$RUNS"/target_only/f0.25_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.25_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.25_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.25_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.25_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.25_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.25_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.25_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.25_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.25_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.25_r0/lr0.001_test/errors.json

# target_only, fraction 0.5, replicate 0
mkdir -p "$RUNS"/target_only/f0.5_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.5_s0.h5 "$RUNS"/target_only/f0.5_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.5_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.5_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.5_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.5_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.5_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.5_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.5_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.5_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.5_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.5_r0/lr0.001_test/errors.json

# target_only, fraction 0.8, replicate 0
mkdir -p "$RUNS"/target_only/f0.8_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.8_s0.h5 "$RUNS"/target_only/f0.8_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.8_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.8_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.8_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f0.8_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.8_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.8_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.8_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.8_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.8_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.8_r0/lr0.001_test/errors.json

# target_only, fraction 1, replicate 0
mkdir -p "$RUNS"/target_only/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/target_only/f1_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/target_only/f1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f1_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.02, replicate 0
mkdir -p "$RUNS"/sae/gfn2_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid1_gfn2.h5 "$RUNS"/sae/gfn2_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/sae/gfn1_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid2_gfn1.h5 "$RUNS"/sae/gfn1_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/pretraining_ac4f2f/seed0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=30 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s0.h5 "$RUNS"/fine_tune/f0.02_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.02_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.02_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.02_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.02_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.02_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.02_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.05, replicate 0
mkdir -p "$RUNS"/fine_tune/f0.05_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s0.h5 "$RUNS"/fine_tune/f0.05_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.05_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.05_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.05_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.05_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.05_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.05_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.05_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.1, replicate 0
mkdir -p "$RUNS"/fine_tune/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/fine_tune/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.1_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.25, replicate 0
mkdir -p "$RUNS"/fine_tune/f0.25_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.25_s0.h5 "$RUNS"/fine_tune/f0.25_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.25_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.25_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.25_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.25_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.25_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.25_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.25_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.25_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.25_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.25_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.5, replicate 0
mkdir -p "$RUNS"/fine_tune/f0.5_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.5_s0.h5 "$RUNS"/fine_tune/f0.5_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.5_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.5_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.5_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.5_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.5_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.5_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.5_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.5_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.5_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.5_r0/lr0.001_test/errors.json

# fine_tune, fraction 0.8, replicate 0
mkdir -p "$RUNS"/fine_tune/f0.8_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.8_s0.h5 "$RUNS"/fine_tune/f0.8_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.8_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.8_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.8_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f0.8_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.8_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.8_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.8_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.8_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.8_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.8_r0/lr0.001_test/errors.json

# fine_tune, fraction 1, replicate 0
mkdir -p "$RUNS"/fine_tune/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/fine_tune/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/fine_tune/f1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f1_r0/lr0.001_test/errors.json

# joint_75, fraction 0.02, replicate 0
mkdir -p "$RUNS"/joint_75/f0.02_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s0.h5 "$RUNS"/joint_75/f0.02_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.02_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.02_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.078, "gfn2": 0.451, "gfn1": 0.471}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.02_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.02_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.02_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.02_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.02_r0/lr0.002_test/errors.json

# joint_75, fraction 0.05, replicate 0
mkdir -p "$RUNS"/joint_75/f0.05_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s0.h5 "$RUNS"/joint_75/f0.05_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.05_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.05_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.082, "gfn2": 0.449, "gfn1": 0.469}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.05_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.05_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.05_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.05_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.05_r0/lr0.002_test/errors.json

# joint_75, fraction 0.1, replicate 0
mkdir -p "$RUNS"/joint_75/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/joint_75/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.1_r0/lr0.002_test/errors.json

# joint_75, fraction 0.25, replicate 0
mkdir -p "$RUNS"/joint_75/f0.25_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.25_s0.h5 "$RUNS"/joint_75/f0.25_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.25_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.25_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.25_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.13, "gfn2": 0.426, "gfn1": 0.444}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.25_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.25_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.25_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.25_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.25_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.25_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.25_r0/lr0.002_test/errors.json

# joint_75, fraction 0.5, replicate 0
mkdir -p "$RUNS"/joint_75/f0.5_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.5_s0.h5 "$RUNS"/joint_75/f0.5_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.5_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.5_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.5_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.155, "gfn2": 0.414, "gfn1": 0.431}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.5_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.5_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.5_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.5_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.5_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.5_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.5_r0/lr0.002_test/errors.json

# joint_75, fraction 0.8, replicate 0
mkdir -p "$RUNS"/joint_75/f0.8_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.8_s0.h5 "$RUNS"/joint_75/f0.8_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.8_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.8_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.8_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.172, "gfn2": 0.405, "gfn1": 0.423}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f0.8_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.8_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.8_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.8_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.8_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.8_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.8_r0/lr0.002_test/errors.json

# joint_75, fraction 1, replicate 0
mkdir -p "$RUNS"/joint_75/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint_75/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint_75/f1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f1_r0/lr0.002_test/errors.json

# joint, fraction 0.02, replicate 0
mkdir -p "$RUNS"/pretraining_14df82/seed0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/pretraining_14df82/seed0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.02_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s0.h5 "$RUNS"/joint/f0.02_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.02_r0/lr0.004
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.02_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.078, "gfn2": 0.451, "gfn1": 0.471}' trainer.epochs=20 optimizer.kwargs.lr=0.004 seed=0 checkpoint.dirname="$RUNS"/joint/f0.02_r0/lr0.004/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.02_r0/lr0.004_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.02_r0/lr0.004/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.02_r0/lr0.004_validation/errors.json
mkdir -p "$RUNS"/joint/f0.02_r0/lr0.004_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.02_r0/lr0.004/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.02_r0/lr0.004_test/errors.json

# joint, fraction 0.05, replicate 0
mkdir -p "$RUNS"/joint/f0.05_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s0.h5 "$RUNS"/joint/f0.05_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.05_r0/lr0.004
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.05_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.082, "gfn2": 0.449, "gfn1": 0.469}' trainer.epochs=20 optimizer.kwargs.lr=0.004 seed=0 checkpoint.dirname="$RUNS"/joint/f0.05_r0/lr0.004/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.05_r0/lr0.004_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.05_r0/lr0.004/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.05_r0/lr0.004_validation/errors.json
mkdir -p "$RUNS"/joint/f0.05_r0/lr0.004_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.05_r0/lr0.004/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.05_r0/lr0.004_test/errors.json

# joint, fraction 0.1, replicate 0
mkdir -p "$RUNS"/joint/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/joint/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.1_r0/lr0.004
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=20 optimizer.kwargs.lr=0.004 seed=0 checkpoint.dirname="$RUNS"/joint/f0.1_r0/lr0.004/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.1_r0/lr0.004_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.1_r0/lr0.004/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.1_r0/lr0.004_validation/errors.json
mkdir -p "$RUNS"/joint/f0.1_r0/lr0.004_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.1_r0/lr0.004/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.1_r0/lr0.004_test/errors.json

# joint, fraction 0.25, replicate 0
mkdir -p "$RUNS"/joint/f0.25_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.25_s0.h5 "$RUNS"/joint/f0.25_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.25_r0/lr0.004
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.25_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.25_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.13, "gfn2": 0.426, "gfn1": 0.444}' trainer.epochs=20 optimizer.kwargs.lr=0.004 seed=0 checkpoint.dirname="$RUNS"/joint/f0.25_r0/lr0.004/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.25_r0/lr0.004_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.25_r0/lr0.004/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.25_r0/lr0.004_validation/errors.json
mkdir -p "$RUNS"/joint/f0.25_r0/lr0.004_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.25_r0/lr0.004/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.25_r0/lr0.004_test/errors.json

# joint, fraction 0.5, replicate 0
mkdir -p "$RUNS"/joint/f0.5_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.5_s0.h5 "$RUNS"/joint/f0.5_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.5_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.5_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.5_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.155, "gfn2": 0.414, "gfn1": 0.431}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint/f0.5_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.5_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.5_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.5_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint/f0.5_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.5_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.5_r0/lr0.002_test/errors.json

# joint, fraction 0.8, replicate 0
mkdir -p "$RUNS"/joint/f0.8_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.8_s0.h5 "$RUNS"/joint/f0.8_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f0.8_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.8_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f0.8_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.172, "gfn2": 0.405, "gfn1": 0.423}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint/f0.8_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f0.8_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.8_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f0.8_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint/f0.8_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f0.8_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f0.8_r0/lr0.002_test/errors.json

# joint, fraction 1, replicate 0
mkdir -p "$RUNS"/joint/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed0/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/joint/f1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint/f1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f1_r0/lr0.002_test/errors.json

# delta, fraction 0.1, replicate 0
mkdir -p "$RUNS"/delta/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0_gfn2.h5 "$RUNS"/delta/f0.1_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/delta/f0.1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.difference.files=data/f0.1_s0_gfn2.h5 data.fidelities.difference.val_files=data/f0.1_s0_gfn2_validation.h5 data.fidelities.difference.sae="$RUNS"/delta/f0.1_r0/sae/sae.yaml data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/delta/f0.1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/delta/f0.1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --model difference="$RUNS"/delta/f0.1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/delta/f0.1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/delta/f0.1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --model difference="$RUNS"/delta/f0.1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/delta/f0.1_r0/lr0.001_test/errors.json

# delta, fraction 1, replicate 0
mkdir -p "$RUNS"/delta/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0_gfn2.h5 "$RUNS"/delta/f1_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/delta/f1_r0/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.difference.files=data/f1_s0_gfn2.h5 data.fidelities.difference.val_files=data/f1_s0_gfn2_validation.h5 data.fidelities.difference.sae="$RUNS"/delta/f1_r0/sae/sae.yaml data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=0 checkpoint.dirname="$RUNS"/delta/f1_r0/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/delta/f1_r0/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --model difference="$RUNS"/delta/f1_r0/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/delta/f1_r0/lr0.001_validation/errors.json
mkdir -p "$RUNS"/delta/f1_r0/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed0/lr0.002/run/model.pt --model difference="$RUNS"/delta/f1_r0/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/delta/f1_r0/lr0.001_test/errors.json

# mixed, fraction 0.1, replicate 0
mkdir -p "$RUNS"/mixed/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/mixed/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/mixed/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/mixed/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=40 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/mixed/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/mixed/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/mixed/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/mixed/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/mixed/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/mixed/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/mixed/f0.1_r0/lr0.002_test/errors.json

# mixed, fraction 1, replicate 0
mkdir -p "$RUNS"/mixed/f1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/mixed/f1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/mixed/f1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/mixed/f1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=40 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/mixed/f1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/mixed/f1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/mixed/f1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/mixed/f1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/mixed/f1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/mixed/f1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/mixed/f1_r0/lr0.002_test/errors.json

# target_only, fraction 0.05, replicate 1
mkdir -p "$RUNS"/target_only/f0.05_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s1.h5 "$RUNS"/target_only/f0.05_r1/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.05_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.05_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/target_only/f0.05_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.05_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.05_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.05_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.05_r1/lr0.001_test/errors.json

# target_only, fraction 0.1, replicate 1
mkdir -p "$RUNS"/target_only/f0.1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s1.h5 "$RUNS"/target_only/f0.1_r1/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.1_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/target_only/f0.1_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.1_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.1_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.1_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.1_r1/lr0.001_test/errors.json

# target_only, fraction 1, replicate 1
mkdir -p "$RUNS"/target_only/f1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/target_only/f1_r1/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f1_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/target_only/f1_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f1_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f1_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f1_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f1_r1/lr0.001_test/errors.json

# fine_tune, fraction 0.02, replicate 1
mkdir -p "$RUNS"/pretraining_ac4f2f/seed1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=30 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s1.h5 "$RUNS"/fine_tune/f0.02_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.02_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.02_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/fine_tune/f0.02_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.02_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.02_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.02_r1/lr0.001_test/errors.json

# fine_tune, fraction 0.05, replicate 1
mkdir -p "$RUNS"/fine_tune/f0.05_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s1.h5 "$RUNS"/fine_tune/f0.05_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.05_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.05_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/fine_tune/f0.05_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.05_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.05_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.05_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.05_r1/lr0.001_test/errors.json

# fine_tune, fraction 0.1, replicate 1
mkdir -p "$RUNS"/fine_tune/f0.1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s1.h5 "$RUNS"/fine_tune/f0.1_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.1_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/fine_tune/f0.1_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.1_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.1_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.1_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.1_r1/lr0.001_test/errors.json

# fine_tune, fraction 1, replicate 1
mkdir -p "$RUNS"/fine_tune/f1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/fine_tune/f1_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f1_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/fine_tune/f1_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f1_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f1_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f1_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f1_r1/lr0.001_test/errors.json

# joint_75, fraction 0.02, replicate 1
mkdir -p "$RUNS"/joint_75/f0.02_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s1.h5 "$RUNS"/joint_75/f0.02_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.02_r1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.02_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.067, "gfn2": 0.457, "gfn1": 0.476}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/joint_75/f0.02_r1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.02_r1/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r1/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.02_r1/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.02_r1/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r1/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.02_r1/lr0.002_test/errors.json

# joint_75, fraction 0.05, replicate 1
mkdir -p "$RUNS"/joint_75/f0.05_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s1.h5 "$RUNS"/joint_75/f0.05_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.05_r1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.05_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.075, "gfn2": 0.453, "gfn1": 0.472}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/joint_75/f0.05_r1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.05_r1/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r1/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.05_r1/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.05_r1/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r1/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.05_r1/lr0.002_test/errors.json

# joint_75, fraction 0.1, replicate 1
mkdir -p "$RUNS"/joint_75/f0.1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s1.h5 "$RUNS"/joint_75/f0.1_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.1_r1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s1.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.099, "gfn2": 0.441, "gfn1": 0.46}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/joint_75/f0.1_r1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.1_r1/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r1/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.1_r1/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.1_r1/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r1/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.1_r1/lr0.002_test/errors.json

# joint_75, fraction 1, replicate 1
mkdir -p "$RUNS"/joint_75/f1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint_75/f1_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f1_r1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/joint_75/f1_r1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f1_r1/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r1/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f1_r1/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f1_r1/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r1/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f1_r1/lr0.002_test/errors.json

# joint, fraction 1, replicate 1
mkdir -p "$RUNS"/pretraining_14df82/seed1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/pretraining_14df82/seed1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint/f1_r1/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed1/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f1_r1/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed1/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f1_r1/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=1 checkpoint.dirname="$RUNS"/joint/f1_r1/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f1_r1/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r1/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f1_r1/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint/f1_r1/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r1/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f1_r1/lr0.002_test/errors.json

# delta, fraction 1, replicate 1
mkdir -p "$RUNS"/delta/f1_r1/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0_gfn2.h5 "$RUNS"/delta/f1_r1/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/delta/f1_r1/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.difference.files=data/f1_s0_gfn2.h5 data.fidelities.difference.val_files=data/f1_s0_gfn2_validation.h5 data.fidelities.difference.sae="$RUNS"/delta/f1_r1/sae/sae.yaml data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=1 checkpoint.dirname="$RUNS"/delta/f1_r1/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/delta/f1_r1/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --model difference="$RUNS"/delta/f1_r1/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/delta/f1_r1/lr0.001_validation/errors.json
mkdir -p "$RUNS"/delta/f1_r1/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model gfn2="$RUNS"/pretraining_ac4f2f/seed1/lr0.002/run/model.pt --model difference="$RUNS"/delta/f1_r1/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/delta/f1_r1/lr0.001_test/errors.json

# target_only, fraction 0.05, replicate 2
mkdir -p "$RUNS"/target_only/f0.05_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s2.h5 "$RUNS"/target_only/f0.05_r2/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.05_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.05_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/target_only/f0.05_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.05_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.05_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.05_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.05_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.05_r2/lr0.001_test/errors.json

# target_only, fraction 0.1, replicate 2
mkdir -p "$RUNS"/target_only/f0.1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s2.h5 "$RUNS"/target_only/f0.1_r2/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f0.1_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f0.1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/target_only/f0.1_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f0.1_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f0.1_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f0.1_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f0.1_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f0.1_r2/lr0.001_test/errors.json

# target_only, fraction 1, replicate 2
mkdir -p "$RUNS"/target_only/f1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/target_only/f1_r2/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/target_only/f1_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/target_only/f1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=40 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/target_only/f1_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/target_only/f1_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/target_only/f1_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/target_only/f1_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/target_only/f1_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/target_only/f1_r2/lr0.001_test/errors.json

# fine_tune, fraction 0.02, replicate 2
mkdir -p "$RUNS"/pretraining_ac4f2f/seed2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=30 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s2.h5 "$RUNS"/fine_tune/f0.02_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.02_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.02_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/fine_tune/f0.02_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.02_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.02_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.02_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.02_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.02_r2/lr0.001_test/errors.json

# fine_tune, fraction 0.05, replicate 2
mkdir -p "$RUNS"/fine_tune/f0.05_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s2.h5 "$RUNS"/fine_tune/f0.05_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.05_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.05_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/fine_tune/f0.05_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.05_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.05_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.05_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.05_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.05_r2/lr0.001_test/errors.json

# fine_tune, fraction 0.1, replicate 2
mkdir -p "$RUNS"/fine_tune/f0.1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s2.h5 "$RUNS"/fine_tune/f0.1_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f0.1_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f0.1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/fine_tune/f0.1_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f0.1_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f0.1_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f0.1_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f0.1_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f0.1_r2/lr0.001_test/errors.json

# fine_tune, fraction 1, replicate 2
mkdir -p "$RUNS"/fine_tune/f1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/fine_tune/f1_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/fine_tune/f1_r2/lr0.001
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/fine_tune/f1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=uniform trainer.epochs=10 optimizer.kwargs.lr=0.001 seed=2 checkpoint.dirname="$RUNS"/fine_tune/f1_r2/lr0.001/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/fine_tune/f1_r2/lr0.001_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r2/lr0.001/run/model.pt --data data/validation.h5 --output "$RUNS"/fine_tune/f1_r2/lr0.001_validation/errors.json
mkdir -p "$RUNS"/fine_tune/f1_r2/lr0.001_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/fine_tune/f1_r2/lr0.001/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/fine_tune/f1_r2/lr0.001_test/errors.json

# joint_75, fraction 0.02, replicate 2
mkdir -p "$RUNS"/joint_75/f0.02_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.02_s2.h5 "$RUNS"/joint_75/f0.02_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.02_r2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.02_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.02_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.073, "gfn2": 0.454, "gfn1": 0.473}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/joint_75/f0.02_r2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.02_r2/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r2/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.02_r2/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.02_r2/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.02_r2/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.02_r2/lr0.002_test/errors.json

# joint_75, fraction 0.05, replicate 2
mkdir -p "$RUNS"/joint_75/f0.05_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.05_s2.h5 "$RUNS"/joint_75/f0.05_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.05_r2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.05_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.05_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.078, "gfn2": 0.451, "gfn1": 0.471}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/joint_75/f0.05_r2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.05_r2/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r2/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.05_r2/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.05_r2/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.05_r2/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.05_r2/lr0.002_test/errors.json

# joint_75, fraction 0.1, replicate 2
mkdir -p "$RUNS"/joint_75/f0.1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s2.h5 "$RUNS"/joint_75/f0.1_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f0.1_r2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s2.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f0.1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.094, "gfn2": 0.444, "gfn1": 0.462}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/joint_75/f0.1_r2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f0.1_r2/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r2/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f0.1_r2/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f0.1_r2/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f0.1_r2/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f0.1_r2/lr0.002_test/errors.json

# joint_75, fraction 1, replicate 2
mkdir -p "$RUNS"/joint_75/f1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint_75/f1_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint_75/f1_r2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_ac4f2f/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint_75/f1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/joint_75/f1_r2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint_75/f1_r2/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r2/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint_75/f1_r2/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint_75/f1_r2/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint_75/f1_r2/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint_75/f1_r2/lr0.002_test/errors.json

# joint, fraction 1, replicate 2
mkdir -p "$RUNS"/pretraining_14df82/seed2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0.05 data.val_split_by=composition data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"gfn2": 0.5, "gfn1": 0.5}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/pretraining_14df82/seed2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f1_r2/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f1_s0.h5 "$RUNS"/joint/f1_r2/sae/sae.yaml --charge-term --spin-term --anchor-model "$RUNS"/pretraining_14df82/seed2/lr0.002/run/model.pt --anchor-fidelity gfn2
mkdir -p "$RUNS"/joint/f1_r2/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --load "$RUNS"/pretraining_14df82/seed2/lr0.002/run/model.pt --resume auto --processes 1 data.fidelities.dft.files=data/f1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/joint/f1_r2/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.181, "gfn2": 0.401, "gfn1": 0.418}' trainer.epochs=20 optimizer.kwargs.lr=0.002 seed=2 checkpoint.dirname="$RUNS"/joint/f1_r2/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/joint/f1_r2/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r2/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/joint/f1_r2/lr0.002_validation/errors.json
mkdir -p "$RUNS"/joint/f1_r2/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/joint/f1_r2/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/joint/f1_r2/lr0.002_test/errors.json

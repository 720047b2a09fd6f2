#!/usr/bin/env bash
# The command lines of each point of the study, without trials of learning rates. They are run in the folder of the
# study, whose data they use, and write to another folder in it: RUNS=again bash commands.sh, or a part of them.
# OMP_NUM_THREADS says how many threads each has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-again}


# equal, fraction 0.1, replicate 0
mkdir -p "$RUNS"/sae/gfn2_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid1_gfn2.h5 "$RUNS"/sae/gfn2_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/sae/gfn1_charge_spin
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid2_gfn1.h5 "$RUNS"/sae/gfn1_charge_spin/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/equal/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/equal/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/equal/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/equal/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/equal/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/equal/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/equal/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/equal/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/equal/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/equal/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/equal/f0.1_r0/lr0.002_test/errors.json

# independent, fraction 0.1, replicate 0
mkdir -p "$RUNS"/independent/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/independent/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/independent/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/independent/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/independent/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false sharing.start=independent
mkdir -p "$RUNS"/independent/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/independent/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/independent/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/independent/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/independent/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/independent/f0.1_r0/lr0.002_test/errors.json

# one_embedding, fraction 0.1, replicate 0
mkdir -p "$RUNS"/one_embedding/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/one_embedding/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/one_embedding/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/one_embedding/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/one_embedding/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false sharing.embedding=shared
mkdir -p "$RUNS"/one_embedding/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/one_embedding/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/one_embedding/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/one_embedding/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/one_embedding/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/one_embedding/f0.1_r0/lr0.002_test/errors.json

# one_readout, fraction 0.1, replicate 0
mkdir -p "$RUNS"/one_readout/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/one_readout/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/one_readout/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/one_readout/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/one_readout/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false use_fidelity_readouts=false
mkdir -p "$RUNS"/one_readout/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/one_readout/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/one_readout/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/one_readout/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/one_readout/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/one_readout/f0.1_r0/lr0.002_test/errors.json

# close, fraction 0.1, replicate 0
mkdir -p "$RUNS"/close/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/close/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/close/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/close/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/close/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false 'sharing.closeness={"weight": 0.0001, "to": "gfn2"}'
mkdir -p "$RUNS"/close/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/close/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/close/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/close/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/close/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/close/f0.1_r0/lr0.002_test/errors.json

# scale, fraction 0.1, replicate 0
mkdir -p "$RUNS"/scale/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/scale/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/scale/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../learning_curve/model_scale.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/scale/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/scale/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/scale/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/scale/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/scale/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/scale/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/scale/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/scale/f0.1_r0/lr0.002_test/errors.json

# charge_heads, fraction 0.1, replicate 0
mkdir -p "$RUNS"/charge_heads/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/charge_heads/f0.1_r0/sae/sae.yaml --charge-term --spin-term --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2_charge_spin/sae.yaml
mkdir -p "$RUNS"/charge_heads/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../learning_curve/model_charges.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/charge_heads/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/charge_heads/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/charge_heads/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/charge_heads/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/charge_heads/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/charge_heads/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/charge_heads/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/charge_heads/f0.1_r0/lr0.002_test/errors.json

# plain_terms, fraction 0.1, replicate 0
mkdir -p "$RUNS"/plain_terms/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/plain_terms/f0.1_r0/sae/sae.yaml --charge-term --spin-term
mkdir -p "$RUNS"/plain_terms/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/plain_terms/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2_charge_spin/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1_charge_spin/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/plain_terms/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/plain_terms/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/plain_terms/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/plain_terms/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/plain_terms/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/plain_terms/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/plain_terms/f0.1_r0/lr0.002_test/errors.json

# anchored_elements, fraction 0.1, replicate 0
mkdir -p "$RUNS"/sae/gfn2
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid1_gfn2.h5 "$RUNS"/sae/gfn2/sae.yaml
mkdir -p "$RUNS"/sae/gfn1
"$PYTHON" -m aimnet2mult.train.calc_sae ../../learning_curve/data/fid2_gfn1.h5 "$RUNS"/sae/gfn1/sae.yaml
mkdir -p "$RUNS"/anchored_elements/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/anchored_elements/f0.1_r0/sae/sae.yaml --anchor ../../learning_curve/data/fid1_gfn2.h5 --anchor-sae "$RUNS"/sae/gfn2/sae.yaml
mkdir -p "$RUNS"/anchored_elements/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/anchored_elements/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/anchored_elements/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/anchored_elements/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/anchored_elements/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/anchored_elements/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/anchored_elements/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/anchored_elements/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/anchored_elements/f0.1_r0/lr0.002_test/errors.json

# plain_elements, fraction 0.1, replicate 0
mkdir -p "$RUNS"/plain_elements/f0.1_r0/sae
"$PYTHON" -m aimnet2mult.train.calc_sae data/f0.1_s0.h5 "$RUNS"/plain_elements/f0.1_r0/sae/sae.yaml
mkdir -p "$RUNS"/plain_elements/f0.1_r0/lr0.002
"$PYTHON" -m aimnet2mult.train.cli --config ../../learning_curve/train.yaml --model ../../config/model_small.yaml --resume auto --processes 1 data.fidelities.dft.files=data/f0.1_s0.h5 data.fidelities.dft.val_files=data/validation.h5 data.fidelities.dft.sae="$RUNS"/plain_elements/f0.1_r0/sae/sae.yaml data.fidelities.dft.level=B3LYP/def2-SVP data.fidelities.dft.dispersion=none data.fidelities.gfn2.files=../../learning_curve/data/fid1_gfn2.h5 data.fidelities.gfn2.sae="$RUNS"/sae/gfn2/sae.yaml data.fidelities.gfn2.level=GFN2-xTB 'data.fidelities.gfn2.dispersion={"d4": "gfn2"}' data.fidelities.gfn1.files=../../learning_curve/data/fid2_gfn1.h5 data.fidelities.gfn1.sae="$RUNS"/sae/gfn1/sae.yaml data.fidelities.gfn1.level=GFN1-xTB 'data.fidelities.gfn1.dispersion={"d3bj": {"s8": 2.4, "a1": 0.63, "a2": 5.0}}' data.val_fraction=0 data.samplers.train.kwargs.batches_per_epoch=300 data.samplers.train.kwargs.sampling_strategy=shares 'data.samplers.train.kwargs.shares={"dft": 0.101, "gfn2": 0.44, "gfn1": 0.459}' trainer.epochs=10 optimizer.kwargs.lr=0.002 seed=0 checkpoint.dirname="$RUNS"/plain_elements/f0.1_r0/lr0.002/run run_name=run checkpoint.keep_last=1 checkpoint.kwargs.n_saved=1 report=false
mkdir -p "$RUNS"/plain_elements/f0.1_r0/lr0.002_validation
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/plain_elements/f0.1_r0/lr0.002/run/model.pt --data data/validation.h5 --output "$RUNS"/plain_elements/f0.1_r0/lr0.002_validation/errors.json
mkdir -p "$RUNS"/plain_elements/f0.1_r0/lr0.002_test
"$PYTHON" -m aimnet2mult.study.errors --model dft="$RUNS"/plain_elements/f0.1_r0/lr0.002/run/model.pt --data ../../data/fid0_dft_test.h5 --output "$RUNS"/plain_elements/f0.1_r0/lr0.002_test/errors.json

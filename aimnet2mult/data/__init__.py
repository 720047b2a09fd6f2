"""Datasets on disk, mixing of fidelities, batches. Knows numpy, h5py and torch tensors, never a model."""

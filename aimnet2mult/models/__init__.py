"""AIMNet2, its mixed-fidelity form, and the deployable wrapper."""

"""aimnet2mult: one AIMNet2 interatomic potential for many levels of quantum chemistry.

Importing the package is cheap on purpose: the training stack (Ignite, OmegaConf, wandb), ASE and
matplotlib are loaded only by the modules that need them.
"""

__version__ = "0.1.0"

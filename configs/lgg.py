"""Low-grade glioma on brain MRI: copy this file to change the config.

  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet --workdir=runs/vgg

pspnet_jax/config/lgg.py describes the argument, pspnet_jax/config/base.py lists every key.
"""

from pspnet_jax.config import lgg


def get_config(arg: str = ''):
    return lgg.get_config(arg)  # or: config = ...; config.train.epochs = 100.0; return config

"""Low-grade glioma on brain MRI: a page to copy, for changes of your own.

  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet --workdir=runs/vgg

pspnet_jax/config/lgg.py says what the argument may be, pspnet_jax/config/base.py what may be set.
"""

from pspnet_jax.config import lgg


def get_config(arg: str = ''):
    return lgg.get_config(arg)  # config = ...; then lines such as config.train.epochs = 100.0

"""Your own images and masks: copy this file to change the config.

  python -m pspnet_jax.main --config=configs/folder.py --config.data.source=FOLDER

pspnet_jax/config/folder.py describes the argument, pspnet_jax/config/base.py lists every key.
"""

from pspnet_jax.config import folder


def get_config(arg: str = ''):
    return folder.get_config(arg)  # or: config = ...; config.train.epochs = 100.0; return config

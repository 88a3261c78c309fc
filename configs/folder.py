"""Your own pictures and masks: a page to copy, for changes of your own.

  python -m pspnet_jax.main --config=configs/folder.py --config.data.source=FOLDER

pspnet_jax/config/folder.py says what the argument may be, pspnet_jax/config/base.py what may be
set.
"""

from pspnet_jax.config import folder


def get_config(arg: str = ''):
    return folder.get_config(arg)  # config = ...; then lines such as config.train.epochs = 100.0

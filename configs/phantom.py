"""The embedded default, synthetic heads without download: a page to copy, for changes of your own.

  python -m pspnet_jax.main --config=configs/phantom.py

pspnet_jax/config/phantom.py says what the argument may be, pspnet_jax/config/base.py what may be
set.
"""

from pspnet_jax.config import phantom


def get_config(arg: str = ''):
    return phantom.get_config(arg)  # config = ...; then lines such as config.train.steps = 500

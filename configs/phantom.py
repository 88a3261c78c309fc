"""The built-in default, synthetic heads without a download: copy this file to change the config.

  python -m pspnet_jax.main --config=configs/phantom.py

pspnet_jax/config/phantom.py describes the argument, pspnet_jax/config/base.py lists every key.
"""

from pspnet_jax.config import phantom


def get_config(arg: str = ''):
    return phantom.get_config(arg)  # or: config = ...; config.train.steps = 500; return config

"""The former name of `python -m pspnet_jax.convert`."""

import runpy
import sys

if __name__ == '__main__':
    print('pspnet_jax.models.pretrained is now pspnet_jax.convert', file=sys.stderr)
    runpy.run_module('pspnet_jax.convert', run_name='__main__', alter_sys=True)

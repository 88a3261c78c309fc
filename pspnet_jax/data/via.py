"""Moved to pspnet_jax.rasterize, which this runs."""

import runpy
import sys

if __name__ == '__main__':
    print('pspnet_jax.data.via is now pspnet_jax.rasterize', file=sys.stderr)
    runpy.run_module('pspnet_jax.rasterize', run_name='__main__', alter_sys=True)

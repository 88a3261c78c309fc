"""Moved to pspnet_jax.check, which this runs."""

import runpy
import sys

if __name__ == '__main__':
    print('pspnet_jax.data.check is now pspnet_jax.check', file=sys.stderr)
    runpy.run_module('pspnet_jax.check', run_name='__main__', alter_sys=True)

"""`python -m pspnet_jax.convert` by its former name."""

import runpy
import sys

if __name__ == '__main__':
    print('this is python -m pspnet_jax.convert now', file=sys.stderr)
    runpy.run_module('pspnet_jax.convert', run_name='__main__', alter_sys=True)

"""Convert a published network (torchvision, smp, semseg, image-segmentation-keras) to a run.

  python -m pspnet_jax.convert --source=FILE --model=fcn_resnet50 --out=RUN

The network is detected by the names in the file (pspnet_jax/models/weights); --model must agree if
it is given. RUN can then be evaluated, predict, be exported and start a training (train.init_from).
"""

from absl import flags
from ml_collections import config_flags

from pspnet_jax import cli
from pspnet_jax.config.flags import HERE


def main() -> None:
    from pspnet_jax.training.convert import convert

    given = flags.FLAGS
    convert(given.config, given.source, given.out, model=given.model, order=given.order)


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', str(HERE / 'base.py'), "the rest of the run's config")
    flags.DEFINE_string('source', None, "the network's weights: a file, or hf:REPO[/FILE]")
    flags.DEFINE_string('model', '', "the expected network, such as fcn_resnet50; '': any")
    flags.DEFINE_enum('order', None, ['RGB', 'BGR'], "channel order, if not the source's usual one")
    flags.DEFINE_string('out', None, 'workdir that gets the checkpoint')
    flags.mark_flags_as_required(['source', 'out'])
    cli.run(main)

"""A checkpoint from a published network: torchvision's, smp's, semseg's, image-segmentation-keras'.

  python -m pspnet_jax.convert --source=FILE --model=fcn_resnet50 --out=RUN

What is in the file is seen from its names (pspnet_jax/models/weights); --model, where given, must
agree. RUN can then be evaluated, predict, be exported, and start a training (train.init_from).
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
    flags.DEFINE_string('model', '', "what the file must hold, such as fcn_resnet50; '': any")
    flags.DEFINE_enum('order', None, ['RGB', 'BGR'], "it was trained on, where not its source's")
    flags.DEFINE_string('out', None, 'workdir that gets the checkpoint')
    flags.mark_flags_as_required(['source', 'out'])
    cli.run(main)

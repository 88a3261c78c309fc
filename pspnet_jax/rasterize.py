"""Write label masks from the regions of an annotation file.

  python -m pspnet_jax.rasterize --annotations=FILE --images=FOLDER --out=MASKS
  python -m pspnet_jax.rasterize --annotations=FILE --images=FOLDER --out=MASKS \
      --classes=tumor=1,edema=2 --attribute=type

FILE is from VGG Image Annotator 1 or 2 (JSON or CSV), COCO or labelme (also a folder of its files).
MASKS/NAME.png holds class numbers, where 0 is background; later regions cover earlier ones. COCO's
categories are numbered in the order of their ids. Classes in other files are numbered as found, so
give --classes if several files belong together.
"""

import re

from absl import flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError, say


def parse_classes(text: str) -> dict[str, int]:
    """'tumor=1,edema=2' as a dict. Raises ConfigError."""
    classes = {}
    for item in filter(None, text.split(',')):
        name, _, number = item.rpartition('=')
        name = name.strip()
        if not name or not re.fullmatch(r'\s*[0-9]{1,3}\s*', number):
            raise ConfigError(f'--classes has {item!r}: write NAME=NUMBER,NAME=NUMBER')
        if name in classes:
            raise ConfigError(f'--classes has {name!r} twice: give it one number')
        classes[name] = int(number)
    return classes


def main() -> None:
    from pspnet_jax.data.formats.via import write_masks

    options = flags.FLAGS
    notes = write_masks(
        options.annotations,
        options.images,
        options.out,
        classes=parse_classes(options.classes),
        attribute=options.attribute,
        line_width=options.line_width,
    )
    for note in [*notes, f'masks are in {options.out}']:
        say(note)


if __name__ == '__main__':
    flags.DEFINE_string('annotations', None, 'file of VIA, COCO or labelme', required=True)
    flags.DEFINE_string('images', None, 'folder of the images', required=True)
    flags.DEFINE_string('out', None, 'folder for the masks', required=True)
    flags.DEFINE_string('classes', '', "NAME=NUMBER,...; '': COCO's by id, others in sorted order")
    flags.DEFINE_string('attribute', '', 'the attribute with the class, if regions have several')
    flags.DEFINE_float('line_width', 1.0, 'in pixels, of open polylines')
    cli.run(main)

"""Published weights for our networks: finds files (`sources`), reads them (`readers`), knows their
names (`tables`) and translates their arrays (`translate`).

  model.pretrained=FILE                         weights of a classifier into the backbone
  model.pretrained=hf:REPO[@REVISION][/FILE]    the same, by huggingface_hub
  model.pretrained=imagenet                     the same, a public file by backbone
  python -m pspnet_jax.convert                  a whole network into a checkpoint
"""

from pspnet_jax.models.weights.readers import check_archive, read_arrays
from pspnet_jax.models.weights.sources import PUBLIC, Public, fetch, fetch_public, public
from pspnet_jax.models.weights.tables import (
    IMAGENET,
    NETWORKS,
    TABLES,
    Normalization,
    Table,
    fixed_intensity,
    measured_how,
)
from pspnet_jax.models.weights.translate import (
    adapt_stem,
    detect,
    is_name_of,
    load_backbone,
    load_network,
    network_options,
    to_torch,
)

__all__ = [
    'IMAGENET', 'NETWORKS', 'PUBLIC', 'TABLES', 'Normalization', 'Public', 'Table', 'adapt_stem',
    'check_archive', 'detect', 'fetch', 'fetch_public', 'fixed_intensity', 'is_name_of',
    'load_backbone', 'load_network', 'measured_how', 'network_options', 'public', 'read_arrays',
    'to_torch',
]  # fmt: skip

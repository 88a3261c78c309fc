"""Low-grade glioma on brain MRI (Buda et al. 2019): the reference run.

  python -m pspnet_jax.main --config=configs/lgg.py --workdir=runs/lgg
  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet --workdir=runs/vgg \\
      --config.data.source=FOLDER --config.model.pretrained=vgg16_imagenet.safetensors

| argument         | network                                                       |
|------------------|---------------------------------------------------------------|
| pspnet_resnet50  | the default; also _resnet18, _resnet34, _resnet101            |
| vgg_pspnet       | dilated VGG16 at output stride 8, full-resolution output      |
| vgg_pspnet_blog  | image-segmentation-keras' geometry: stride 32, quarter output |
"""

from configs import base


def get_config(arg: str = ''):
    config = base.get_config()
    config.data.name = 'lgg'
    arg = arg or 'pspnet_resnet50'
    if arg == 'vgg_pspnet':
        config.model.backbone = 'vgg16'
    elif arg == 'vgg_pspnet_blog':
        config.model.name = 'vgg_pspnet_blog'
        config.model.backbone = 'vgg16'
    elif arg.startswith('pspnet_resnet'):
        config.model.backbone = arg.removeprefix('pspnet_')
    else:
        raise ValueError(
            f'configs/lgg.py:{arg} is not known: use pspnet_resnet18, _resnet34, _resnet50, '
            '_resnet101, vgg_pspnet or vgg_pspnet_blog'
        )
    return config

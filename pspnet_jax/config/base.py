"""Every key of the config, with its default and its meaning.

Only this file introduces keys: other configs call `get_config` and change values. The config is
locked, so a misspelt key is an error.
"""

import re
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


# Long, since it lists all keys.
def get_config(arg: str = '') -> ConfigDict:
    del arg
    config = ConfigDict()
    config.seed = 0  # of parameters, order of slices, augmentation, dropout
    config.parallel = 'jit'  # 'jit' over a mesh of all devices, or 'pmap'

    config.model = model = ConfigDict()
    model.name = 'pspnet'  # README: every network and alias
    model.num_classes = 2  # background included; None: as many as the masks or annotations have
    model.class_names = ()  # of all classes, background first; (): taken from the annotations
    model.width = 64  # base channels; 64 in the papers
    model.dtype = 'float32'  # or 'bfloat16'; parameters and logits stay float32
    # Weights of the backbone: 'imagenet', a file, or hf:REPO[@REVISION][/FILE]; '': random weights.
    model.pretrained = ''
    model.stem = 'cycle'  # how RGB filters are adapted to other channels: 'cycle' or 'mean'
    # None: as in the network's paper (pspnet_jax/models/__init__.py). Else
    # vgg16, vgg16_bn, resnet18 .. 152, mobilenet_v2, efficientnet_lite0 .. 4
    model.backbone = placeholder(str)
    model.output_stride = placeholder(int)  # 4, 8, 16 or 32, for networks that allow a choice
    model.dropout = placeholder(float)  # rate before the classifiers
    model.rates = placeholder(tuple)  # dilations of the ASPP
    model.multi_grid = placeholder(tuple)  # factors on the dilation of each block of layer4
    model.fc_features = placeholder(int)  # width of fc6 and fc7; 512: a light head; 0: none
    model.dilate_first_block = placeholder(bool)  # True: as semseg; False: as torchvision
    model.deep_stem = placeholder(bool)  # semseg's three 3x3s instead of ResNet's 7x7
    model.stride_in_1x1 = placeholder(bool)  # ResNet's bottlenecks: for Caffe's and Keras' weights
    model.same_padding = placeholder(bool)  # mobilenet_v2: for Keras' weights
    model.bins = (1, 2, 3, 6)  # pyramid levels of pspnet; (): no pyramid
    model.aux_head = True  # pspnet, fcn, deeplab_v3: a second head, used only in training
    model.deep_supervision = False  # unet: also heads at strides 2, 4, 8, used only in training
    model.context = 'basic'  # context module of dilated: 'basic', 'large', 'none'
    model.scales = (0.5, 0.75, 1.0)  # at which deeplab_v2 sees the image
    model.batch_norm = True  # unet; the paper has none
    model.variant = 'paper'  # deeplab_v3, deeplab_v3plus: 'paper', 'torchvision' or 'smp'

    config.data = data = ConfigDict()
    data.name = 'phantom'  # folder, lgg, phantom, or an entry that you add to data.sources.SOURCES
    data.source = ''  # folder of the raw data; '' with lgg: downloaded from Kaggle
    data.root = ''  # where the built data set is stored; '': tfds' own folder
    data.images = ('images',)  # 'folder': one folder, or one per group of channels, in data.source
    # or as whole paths; 'imagesTr/{stem}_0000' selects files of a folder by name
    data.masks = 'masks'  # 'folder': the masks' folder, or an annotation file (VIA, COCO, labelme)
    data.attribute = ''  # annotations: the attribute with the class, if there are several
    data.mask_format = 'auto'  # 'index', 'binary', 'color'; 'auto': detected and printed
    data.mask_colors = ()  # '#rrggbb' of each class in order, background first
    data.label_map = placeholder(object)  # mask values to classes: {4: 3}, {'>0': 1}
    data.mask_name = '{stem}'  # the mask of STEM.png; or '{stem}_mask'; several: '{stem}_mask*'
    data.group = ''  # the patient in an image's name, "(.+)_", or a .csv of stem,patient; slices of
    # a volume need "(.+)_(?P<slice>[0-9]+)" or a column slice, else each is a case of its own
    data.size = ()  # (height, width) that the network sees; (): the slices' own size, or if they
    # differ one near their median: multiples of 32, at most 512
    data.fit = placeholder(str)  # how slices become data.size. 'letterbox': keep the aspect ratio,
    # pad with ignored pixels; 'stretch': fill height and width. None: as in the resumed run, else
    # 'letterbox'
    data.context = 0  # neighbouring slices on each side that the network also sees, as channels
    # (2.5D); the first and last slice of a scan are repeated
    data.normalize = placeholder(str)  # None: 'weights' if model.pretrained is a file, else
    # 'volume'; 'weights': as the weights expect, images that are not 8-bit are first scaled from
    # their measured range to 0 to 255; 'buda': each volume as in Buda's code, one range for all
    # channels, measured on the head
    data.split = 'holdout'  # or 'kfold', 'site': one fold or site is the test set
    data.folds = 5  # 'kfold': number of folds; python -m experiments.crossval runs them all
    data.fold = 0  # 'kfold': the test fold
    data.site = ''  # 'site': the test site
    data.split_file = ''  # a run's splits.json, instead of these
    data.test_fraction = 0.15  # of patients, if the data has no public hold-out
    data.validation_fraction = 0.1  # of the other patients, site by site
    data.split_seed = 0  # of the choice of test and validation patients
    # 'lgg': the ten patients that Buda's code held out are the test set of 'holdout', and are left
    # out of other splits; False: they are like all others
    data.public_holdout = True
    data.sampling = 'lesion'  # 'lesion': in proportion to lesion area (Buda 2019), or 'uniform'
    data.lesion_floor = 0.1  # share of draws that ignore the lesion (1/11 in Buda's code)
    data.threads = 4  # threads that decode slices ahead of the step
    data.bad_slices = 'stop'  # at an unreadable slice in training; 'skip': use another and list it
    data.cache = 'memory'  # decoded slices: 'none', 'memory' if they fit, 'device' (jit only)

    config.phantom = phantom = ConfigDict()
    phantom.volumes = 40  # synthetic heads
    phantom.slices = 12  # per volume
    phantom.size = 128  # side in pixels
    phantom.seed = 0  # of the heads

    config.augment = augment = ConfigDict()  # 'light' of configs/augmentations.py
    augment.crop = 0  # side in pixels; 0: the whole slice
    augment.flip = 0.5  # probability, left-right
    augment.flip_vertical = 0.0  # probability, upside-down
    augment.scale = 0.1  # zoom by 1/1.1 .. 1.1
    augment.rotate = 15.0  # +- degrees
    augment.elastic = 0.0  # standard deviation of the deformation, pixels
    augment.blur = 0.0  # largest standard deviation of a Gaussian, pixels (nnU-Net: 1)
    augment.blur_probability = 0.2  # as in nnU-Net
    augment.low_resolution = 0.0  # largest share of rows and columns that is lost (nnU-Net: 0.5)
    augment.low_resolution_probability = 0.25  # as in nnU-Net
    augment.gamma = 0.0  # 0.5: powers of 1/1.5 .. 1.5, per channel (nnU-Net: 0.7 .. 1.5)
    augment.gamma_probability = 0.3  # as in nnU-Net
    augment.gain = 0.1  # +- share, per channel
    augment.bias = 0.1  # +- standard deviations, per channel
    augment.noise = 0.0  # largest standard deviation
    augment.channel_dropout = 0.0  # probability that one channel replaces the others
    augment.kept_channel = placeholder(int)  # the one that stays; None: drawn each time

    config.loss = loss = ConfigDict()
    loss.cross_entropy = 1.0  # weight in the sum
    loss.dice = 1.0  # weight in the sum
    loss.focal = 0.0  # weight in the sum; a loss with weight 0 is not computed
    loss.focal_gamma = 2.0  # how little confident pixels count; Lin 2017 found 2 best
    loss.tversky = 0.0  # weight in the sum, instead of dice
    loss.tversky_alpha = 0.3  # cost of false positives
    loss.tversky_beta = 0.7  # cost of false negatives; both 0.5: dice. Salehi 2017 found these best
    loss.lovasz = 0.0  # weight in the sum; Berman 2018 fine-tunes with it
    loss.top_k = 0.0  # weight in the sum: cross-entropy of the hardest pixels
    loss.top_k_share = 0.1  # hardest share of the batch's pixels; 10 % as in nnU-Net
    loss.boundary = 0.0  # weight in the sum, together with dice: Kervadec 2019 starts at 0.01
    loss.extra = placeholder(object)  # weights of your entries of losses.TERMS: {'mine': 0.5}
    loss.aux = 0.4  # weight of each auxiliary head's loss (paper, section 3.3)
    loss.class_weights = ()  # of cross_entropy, focal and top_k; (): all 1
    loss.ignore_label = 255  # label of pixels that count in no loss and no metric

    config.optim = optim = ConfigDict()
    optim.name = 'adamw'  # adamw, adam, adamax, sgd, rmsprop, adagrad, adadelta (rate near 1)
    optim.learning_rate = 1e-4  # of the backbone; None: chosen by whether its weights are
    # pretrained (training/start.py)
    optim.new_layer_factor = 10.0  # factor on the rate of other layers (semseg); None: 3 if
    # pretrained, else 1
    optim.schedule = 'poly'  # poly, cosine, constant
    optim.power = 0.9  # of poly
    optim.warmup = 0.1  # share of the run in which the rate rises; at most optim.warmup_steps
    optim.warmup_steps = 50  # longest warm-up
    optim.momentum = 0.9  # of sgd; b1 of the Adams
    optim.beta2 = 0.999  # of the Adams
    optim.rho = 0.9  # of rmsprop and adadelta: decay of the average of squares
    optim.weight_decay = 1e-4  # towards 0, decoupled in adamw
    optim.decay_exclude = ('bias', 'scale')  # parameter names that are not decayed
    optim.clip_norm = 1.0  # 0: no clipping

    config.distill = distill = ConfigDict()
    distill.teacher = ''  # a run's workdir, or WORKDIR@last, WORKDIR@STEP; '': none
    distill.loss = 'kl'  # 'kl', 'l1', 'l2': of the teacher's probabilities
    distill.weight = 1.0  # of that loss in the sum; with loss.* at 0 only the teacher counts
    distill.temperature = 1.0  # of 'kl'; 2 to 4 soften a confident teacher
    distill.pairwise = 0.0  # weight of the affinities between cells (Liu 2019: 10)
    distill.nodes = 8  # cells per side of the backbone's last map, for distill.pairwise

    config.train = train = ConfigDict()
    train.init_from = ''  # weights of another run: WORKDIR (its best), WORKDIR@last, WORKDIR@STEP
    train.batch_size = 16  # over all devices
    train.accumulate = 1  # micro-batches per step
    train.remat = 'pointwise'  # recompute all but convolutions for the gradient; 'none': nothing
    train.steps_per_call = 10  # updates in one program, with data.cache = 'device'
    train.epochs = 50.0  # passes over the training slices; None: chosen by their number
    # (training/start.py)
    train.steps = 0  # if above 0, replaces epochs
    train.ema_decay = 0.0  # of the average of the parameters, which is then evaluated; 0: none
    train.log_every = 10  # steps
    train.validate_every = 0  # steps; 0: ten times per run
    train.checkpoint_every = 0  # steps; 0: at each validation
    train.nan_policy = 'stop'  # at a NaN or infinite loss or gradient; 'skip': skip that update
    train.max_skipped = 10  # most updates that a run may skip; one more stops it
    train.patience = 0  # validations without a better Dice before stopping; 0: never

    config.crf = crf = ConfigDict()  # fully connected, for evaluation and prediction
    crf.kernel = 'none'  # 'exact': all pairs, up to 128 x 128 pixels; 'windowed': for larger images
    crf.window = 16  # pixels each way, for 'windowed'
    crf.iterations = 10  # of mean field
    crf.spatial_weight = 3.0  # of the kernel over position
    crf.spatial_sigma = 3.0  # pixels
    crf.bilateral_weight = 4.0  # of the kernel over position and colour
    crf.bilateral_sigma = 49.0  # pixels
    crf.color_sigma = 0.3  # of the normalised image

    config.predict = predict = ConfigDict()  # for evaluation and prediction, not validation
    predict.window = 0  # side in pixels of the tiles that the network sees; 0: whole images
    predict.overlap = 0.5  # of neighbouring tiles, as a share of the window
    predict.scales = (1.0,)  # average over these image scales, such as (0.75, 1.0, 1.25)
    predict.flip = False  # average with the left-right mirror image
    predict.threshold = placeholder(float)  # on class 1 of two; None: the likeliest class
    predict.largest_component = False  # keep only the largest component of each class
    predict.min_size = 0  # pixels or voxels; smaller components are removed

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 16  # slices, or tiles with predict.window
    evaluation.spacing = (1.0, 1.0, 1.0)  # of slices, rows, columns; sets the unit of HD95
    evaluation.surface_tolerance = 1.0  # of surface Dice, in that unit
    evaluation.lesion_dilation = 3  # true lesions that touch after so many steps are one
    evaluation.lesion_smallest = 50.0  # that unit cubed; only larger lesions count (BraTS)
    evaluation.calibration_bins = 15  # equal bins of the foreground probability
    evaluation.bootstrap = 10_000  # resamples of the patients for the confidence interval
    evaluation.checkpoint = 'best'  # 'best' by validation Dice, or 'last'
    return config.lock()


def comments() -> dict[str, str]:
    """{'model.width': its comment above}. A comment follows its key on the same line and on the
    lines after; a key without one on its line takes the lines before it.
    """
    told, section, last, waiting = {}, '', '', []
    for line in Path(__file__).read_text('utf-8').splitlines():
        if match := re.fullmatch(r'    config\.(\w+) = \w+ = ConfigDict\(\)(?:  # .*)?', line):
            section = f'{match[1]}.'
        elif match := re.fullmatch(r'    # (.*)', line):
            waiting.append(match[1])
        elif match := re.fullmatch(r'    (\w+)\.(\w+) = (?:.*?)(?:  # (.*))?', line):
            key = match[2] if match[1] == 'config' else section + match[2]
            told[key] = match[3] or ' '.join(waiting)
            if match[3] and waiting:
                told[last] = ' '.join([told[last], *waiting])
            last, waiting = key, []
    return told

"""image-segmentation-keras' vgg_pspnet, for speed.py.

Run it with the Python of a separate environment, where `tensorflow-cpu==2.13.*` and
`keras-segmentation==0.3.0` are installed.
"""

import functools
import json
import sys
import time

import keras
import keras_segmentation
import numpy as np
import tensorflow as tf
from keras_segmentation.models.pspnet import _pspnet
from keras_segmentation.models.vgg16 import get_vgg_encoder

from experiments.benchmarks.serve import serve


def main() -> None:
    case = json.loads(sys.argv[1])
    size, batch = case['size'], case['batch']
    encoder = functools.partial(get_vgg_encoder, pretrained=None)
    model = _pspnet(case['classes'], encoder, input_height=size, input_width=size)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, case['classes'], (batch, size // 4 * (size // 4)))
    target = np.eye(case['classes'], dtype=np.float32)[labels]
    # Its last layer is a softmax, but the logits are compared.
    logits = tf.keras.Model(model.inputs, model.layers[-2].output)
    out = logits.predict_on_batch(image).reshape(batch, size // 4, size // 4, -1)
    model.save_weights(case['exchange'] + '.h5')
    np.savez(case['exchange'] + '.out.npz', image=image, out=out)
    model.compile('sgd', 'categorical_crossentropy')
    start = time.perf_counter()
    if case['train']:
        step = functools.partial(model.train_on_batch, image, target)
    else:
        step = functools.partial(model.predict_on_batch, image)
    step()
    info = {
        'parameters': sum(int(np.prod(w.shape)) for w in model.trainable_weights),
        'compile_seconds': time.perf_counter() - start,
        'versions': {
            'tensorflow': tf.__version__,
            'keras': keras.__version__,
            'keras_segmentation': getattr(keras_segmentation, '__version__', '0.3.0'),
        },
    }
    serve(step, info)


if __name__ == '__main__':
    main()

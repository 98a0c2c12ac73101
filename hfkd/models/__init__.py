"""Students, generators, and one view of any image classifier. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .adapter import ClassifierAdapter, ClassifierFeatures
from .configuration_bigan_encoder import HfkdBiganEncoderConfig
from .configuration_bigan_generator import HfkdBiganGeneratorConfig
from .configuration_conditional_generator import HfkdConditionalGeneratorConfig
from .configuration_gradient_features import HfkdGradientFeaturesConfig
from .configuration_mlp import HfkdMlpConfig
from .configuration_resnet import HfkdResNetConfig
from .configuration_vae_encoder import HfkdVaeEncoderConfig
from .configuration_wide_resnet import HfkdWideResNetConfig
from .custom_code import code_files
from .generator import GeneratorOutput, GeneratorPreTrainedModel
from .gradient_features import build_gradient_features
from .modeling_bigan_encoder import HfkdBiganEncoderForImageClassification, HfkdBiganEncoderModel
from .modeling_bigan_generator import HfkdBiganGeneratorModel
from .modeling_conditional_generator import HfkdConditionalGeneratorModel
from .modeling_gradient_features import HfkdGradientFeaturesForImageClassification, HfkdGradientFeaturesModel
from .modeling_mlp import HfkdMlpForImageClassification, HfkdMlpModel
from .modeling_resnet import HfkdResNetForImageClassification, HfkdResNetModel
from .modeling_vae_encoder import HfkdVaeEncoderForImageClassification, HfkdVaeEncoderModel
from .modeling_wide_resnet import HfkdWideResNetForImageClassification, HfkdWideResNetModel
from .presets import STUDENT_PRESETS, StudentPreset, build_student, load_base
from .processing import build_image_processor


__all__ = [
    "STUDENT_PRESETS",
    "ClassifierAdapter",
    "ClassifierFeatures",
    "GeneratorOutput",
    "GeneratorPreTrainedModel",
    "HfkdBiganEncoderConfig",
    "HfkdBiganEncoderForImageClassification",
    "HfkdBiganEncoderModel",
    "HfkdBiganGeneratorConfig",
    "HfkdBiganGeneratorModel",
    "HfkdConditionalGeneratorConfig",
    "HfkdConditionalGeneratorModel",
    "HfkdGradientFeaturesConfig",
    "HfkdGradientFeaturesForImageClassification",
    "HfkdGradientFeaturesModel",
    "HfkdMlpConfig",
    "HfkdMlpForImageClassification",
    "HfkdMlpModel",
    "HfkdResNetConfig",
    "HfkdResNetForImageClassification",
    "HfkdResNetModel",
    "HfkdVaeEncoderConfig",
    "HfkdVaeEncoderForImageClassification",
    "HfkdVaeEncoderModel",
    "HfkdWideResNetConfig",
    "HfkdWideResNetForImageClassification",
    "HfkdWideResNetModel",
    "StudentPreset",
    "build_gradient_features",
    "build_image_processor",
    "build_student",
    "code_files",
    "load_base",
]

for _backbone, _classifier in (
    (HfkdGradientFeaturesModel, HfkdGradientFeaturesForImageClassification),
    (HfkdMlpModel, HfkdMlpForImageClassification),
    (HfkdResNetModel, HfkdResNetForImageClassification),
    (HfkdWideResNetModel, HfkdWideResNetForImageClassification),
    (HfkdBiganEncoderModel, HfkdBiganEncoderForImageClassification),
    (HfkdVaeEncoderModel, HfkdVaeEncoderForImageClassification),
):
    _config = _backbone.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _backbone, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)

for _generator in (HfkdBiganGeneratorModel, HfkdConditionalGeneratorModel):
    _config = _generator.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _generator, exist_ok=True)

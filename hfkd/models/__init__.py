"""Students, generators, and one view of any image classifier. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .adapter import ClassifierAdapter, ClassifierFeatures
from .configuration_bigan_encoder import HfkdBiganEncoderConfig
from .configuration_bigan_generator import HfkdBiganGeneratorConfig
from .configuration_conditional_generator import HfkdConditionalGeneratorConfig
from .configuration_dcgan_discriminator import HfkdDcganDiscriminatorConfig
from .configuration_dcgan_generator import HfkdDcganGeneratorConfig
from .configuration_gradient_features import HfkdGradientFeaturesConfig
from .configuration_mlp import HfkdMlpConfig
from .configuration_resnet import HfkdResNetConfig
from .configuration_stylegan2_discriminator import HfkdStyleGan2DiscriminatorConfig
from .configuration_stylegan2_generator import HfkdStyleGan2GeneratorConfig
from .configuration_vae_encoder import HfkdVaeEncoderConfig
from .configuration_wide_resnet import HfkdWideResNetConfig
from .custom_code import code_files
from .discriminator import DiscriminatorOutput, DiscriminatorPreTrainedModel
from .generator import GeneratorOutput, GeneratorPreTrainedModel
from .gradient_features import build_gradient_features
from .modeling_bigan_encoder import HfkdBiganEncoderForImageClassification, HfkdBiganEncoderModel
from .modeling_bigan_generator import HfkdBiganGeneratorModel
from .modeling_conditional_generator import HfkdConditionalGeneratorModel
from .modeling_dcgan_discriminator import HfkdDcganDiscriminatorModel
from .modeling_dcgan_generator import HfkdDcganGeneratorModel
from .modeling_gradient_features import HfkdGradientFeaturesForImageClassification, HfkdGradientFeaturesModel
from .modeling_mlp import HfkdMlpForImageClassification, HfkdMlpModel
from .modeling_resnet import HfkdResNetForImageClassification, HfkdResNetModel
from .modeling_stylegan2_discriminator import HfkdStyleGan2DiscriminatorModel
from .modeling_stylegan2_generator import HfkdStyleGan2GeneratorModel
from .modeling_vae_encoder import HfkdVaeEncoderForImageClassification, HfkdVaeEncoderModel
from .modeling_wide_resnet import HfkdWideResNetForImageClassification, HfkdWideResNetModel
from .presets import STUDENT_PRESETS, StudentPreset, build_student, load_base
from .processing import build_image_processor


__all__ = [
    "STUDENT_PRESETS",
    "ClassifierAdapter",
    "ClassifierFeatures",
    "DiscriminatorOutput",
    "DiscriminatorPreTrainedModel",
    "GeneratorOutput",
    "GeneratorPreTrainedModel",
    "HfkdBiganEncoderConfig",
    "HfkdBiganEncoderForImageClassification",
    "HfkdBiganEncoderModel",
    "HfkdBiganGeneratorConfig",
    "HfkdBiganGeneratorModel",
    "HfkdConditionalGeneratorConfig",
    "HfkdConditionalGeneratorModel",
    "HfkdDcganDiscriminatorConfig",
    "HfkdDcganDiscriminatorModel",
    "HfkdDcganGeneratorConfig",
    "HfkdDcganGeneratorModel",
    "HfkdGradientFeaturesConfig",
    "HfkdGradientFeaturesForImageClassification",
    "HfkdGradientFeaturesModel",
    "HfkdMlpConfig",
    "HfkdMlpForImageClassification",
    "HfkdMlpModel",
    "HfkdResNetConfig",
    "HfkdResNetForImageClassification",
    "HfkdResNetModel",
    "HfkdStyleGan2DiscriminatorConfig",
    "HfkdStyleGan2DiscriminatorModel",
    "HfkdStyleGan2GeneratorConfig",
    "HfkdStyleGan2GeneratorModel",
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

for _generator in (
    HfkdBiganGeneratorModel,
    HfkdConditionalGeneratorModel,
    HfkdDcganGeneratorModel,
    HfkdDcganDiscriminatorModel,
    HfkdStyleGan2GeneratorModel,
    HfkdStyleGan2DiscriminatorModel,
):
    _config = _generator.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _generator, exist_ok=True)

"""Students, and one view of any image classifier. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .adapter import ClassifierAdapter, ClassifierFeatures
from .configuration_resnet import HfkdResNetConfig
from .configuration_wide_resnet import HfkdWideResNetConfig
from .custom_code import code_files
from .modeling_resnet import HfkdResNetForImageClassification, HfkdResNetModel
from .modeling_wide_resnet import HfkdWideResNetForImageClassification, HfkdWideResNetModel
from .presets import STUDENT_PRESETS, StudentPreset, build_student
from .processing import build_image_processor


__all__ = [
    "STUDENT_PRESETS",
    "ClassifierAdapter",
    "ClassifierFeatures",
    "HfkdResNetConfig",
    "HfkdResNetForImageClassification",
    "HfkdResNetModel",
    "HfkdWideResNetConfig",
    "HfkdWideResNetForImageClassification",
    "HfkdWideResNetModel",
    "StudentPreset",
    "build_image_processor",
    "build_student",
    "code_files",
]

for _backbone, _classifier in (
    (HfkdResNetModel, HfkdResNetForImageClassification),
    (HfkdWideResNetModel, HfkdWideResNetForImageClassification),
):
    _config = _backbone.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _backbone, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)

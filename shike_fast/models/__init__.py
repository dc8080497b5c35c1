"""Multi-expert networks by name, and weights from elsewhere.

``create_model("resnet32", num_classes=100)`` builds one, ``list_models()`` names them, ``register_model`` adds one.
``create_model("timm:NAME", num_classes=100)`` makes one of a network of timm; ``register_model_family`` adds a family.
``convert_reference_state_dict`` reads weights of the published code, ``convert_ride_state_dict`` those of RIDE, SADE,
BalPoE and MDCS, ``load_pretrained`` torchvision-named ones.
A backbone of your own subclasses ``MultiExpertNetwork``. ``freeze``, ``add_adapters`` and ``init_classifiers`` prepare
one for fine-tuning.
"""

from shike_fast.models import zoo  # noqa: F401  (registers the networks)
from shike_fast.models.adapters import add_adapters, merge_adapters
from shike_fast.models.class_means import init_classifiers
from shike_fast.models.freezing import freeze
from shike_fast.models.multi_expert import FeatureMap, MultiExpertNetwork, ResidualBlock
from shike_fast.models.registry import (
    create_model,
    is_model,
    list_model_families,
    list_models,
    register_model,
    register_model_family,
)
from shike_fast.models.resnet import BasicBlock, Bottleneck, MultiExpertResNet
from shike_fast.models.ride import convert_ride_state_dict, describe_ride_state_dict
from shike_fast.models.weights import PretrainedReport, convert_reference_state_dict, load_pretrained

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "FeatureMap",
    "MultiExpertNetwork",
    "MultiExpertResNet",
    "PretrainedReport",
    "ResidualBlock",
    "add_adapters",
    "convert_reference_state_dict",
    "convert_ride_state_dict",
    "create_model",
    "describe_ride_state_dict",
    "freeze",
    "init_classifiers",
    "is_model",
    "list_model_families",
    "list_models",
    "load_pretrained",
    "merge_adapters",
    "register_model",
    "register_model_family",
]

"""The exported model for the auto classes of transformers, without remote code.

Once this module is imported, AutoModelForCausalLM.from_pretrained reads a folder of `--format mlra` by this package's
own code, and from_config makes a new model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM, MlraModel

AutoConfig.register(MlraConfig.model_type, MlraConfig, exist_ok=True)
AutoModel.register(MlraConfig, MlraModel, exist_ok=True)
AutoModelForCausalLM.register(MlraConfig, MlraForCausalLM, exist_ok=True)

__all__ = ["MlraConfig", "MlraForCausalLM", "MlraModel"]

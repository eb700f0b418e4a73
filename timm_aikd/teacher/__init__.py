"""The frozen teacher: from a spec to a model with its own weights, checked against the student."""
from .build import build_model as build_model
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import load_checkpoint as load_checkpoint
from .classes import class_count as class_count
from .classes import data_set_classes as data_set_classes
from .classes import match_classes as match_classes
from .ensemble import TeacherEnsemble as TeacherEnsemble
from .load import load_model as load_model
from .load import load_teacher as load_teacher
from .model import LoadedModel as LoadedModel
from .model import TimmModel as TimmModel
from .spec import FORMS as FORMS
from .spec import HUB_ID as HUB_ID
from .spec import TeacherSpec as TeacherSpec
from .spec import naming as naming
from .teacher import Teacher as Teacher

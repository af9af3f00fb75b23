"""kvjax: when, where and in what order the lookup mechanism of a small transformer forms.

Importing the package is instant; JAX and the rest load with the subpackage that uses them.
"""

__version__ = "0.1.0"

"""The configs that come with the package. A project's own folder `configs` adds to them and does not hide them."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)

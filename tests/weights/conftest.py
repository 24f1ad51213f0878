"""The tiny models as ComfyUI keeps them."""

import pytest
from one_file_examples import example, flux2_of_its_makers, z_image_of_its_makers


@pytest.fixture(scope="module")
def z_image(tiny, tmp_path_factory):
    return example(tiny.pipeline, z_image_of_its_makers, tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def flux2(tiny_flux2, tmp_path_factory):
    return example(tiny_flux2, flux2_of_its_makers, tmp_path_factory.mktemp("flux2"))


@pytest.fixture(params=["z_image", "flux2"])
def model(request):
    return request.getfixturevalue(request.param)

from setuptools import setup

setup(
    name="lavis-ringnet",
    version="0.1.0",
    description="A made-up retriever that plugs into LAVIS and LAVIS-DCD",
    packages=["lavis_ringnet"],
    package_data={"lavis_ringnet": ["*.yaml"]},
    install_requires=["lavis-dcd"],
    # the whole connection: LAVIS-DCD imports what this group names, and the import registers the model and its adapter
    entry_points={"lavis.plugins": ["ringnet = lavis_ringnet"]},
)

"""The command lines. Installed, this folder is the package `resnet_deploy`, whose console script runs them."""

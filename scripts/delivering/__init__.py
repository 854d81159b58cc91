"""The steps of delivery.py. `image_steps` contains the steps for images. `stack_steps` contains the steps for a stack.
`smoke_test` tests a server. `renewal` tests a new release of MLflow. The steps write output for GitHub with the module
`github`, and run programs with the module `commands`."""

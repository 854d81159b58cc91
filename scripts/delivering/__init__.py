"""The steps of delivery.py: for images (`image_steps`), for a stack (`stack_steps`), the smoke test (`smoke_test`), the
renewal of MLflow (`renewal`). They write their output for GitHub with `github` and run programs with `commands`."""

"""Pulumi's entry point: read the settings, check them against AWS, declare the resources, export the outputs."""

import pulumi

import aws_provider
import credentials
import iam_roles
import monitoring
import network
import outputs
import preflight
import server
import settings
import storage
import user_data

config, mistakes = settings.read()
aws = aws_provider.provider(config)
found, refusals = preflight.inspect(config, aws)
wrong = mistakes + refusals or user_data.problems(config, found.image)
if wrong:
    raise pulumi.RunError(settings.as_sentences(wrong))
for caution in settings.cautions(config) + user_data.cautions(config, found.image):
    pulumi.log.warn(caution)
if config.channel:
    pulumi.log.info(preflight.channel_summary(config, found))
pulumi.log.info(preflight.upgrade_summary(found))
if config.restore_from:
    pulumi.log.info(preflight.restore_summary(config))

here = pulumi.ResourceOptions(provider=aws)
net = network.build(config, found.zones, here)
kept = storage.build(config, found, here)
parameters = credentials.build(config, found, kept.volume, here)
logs = monitoring.log_group(config, here)
role = iam_roles.role(config, kept, parameters, logs, here)
machine = server.launch(config, found, net, kept, parameters, role, here)
monitoring.build(config, found.image, kept, machine.instance, here)
outputs.export(config, found, net, kept, parameters, machine)

//go:build tool

package tool

import _ "github.com/hashicorp/packer"

//go:build tool

package tool

import _ "github.com/rhysd/actionlint/cmd/actionlint"

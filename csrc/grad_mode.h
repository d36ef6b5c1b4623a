// What embedding_grad does with the sum of a segment. The same numbers as in embedkernels/reference/embedding.py.
#pragma once

namespace embedkernels {

enum class GradMode {
  kDense = 0,       // written to its row of the table; every other row is written as zeros
  kAccumulate = 1,  // added to its row of the table; no other row is touched
  kRows = 2,        // written to row s of the output for segment s; rows from `count` on are left as they are
  kPaddedRows = 3,  // the same, and rows from `count` on are written as zeros
};

}  // namespace embedkernels
